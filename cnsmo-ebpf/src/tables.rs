//! What the pipeline asks of its surroundings: maps and clock in the kernel, collections in tests.

use cnsmo_common::{
    Direction,
    control::{Control, Live, RuleAction},
    flow::{Conn, FlowKey, Fragment, FragmentKey},
    stat::{Count, Reason},
};

use crate::{conntrack::Step, parse::Datagram};

/// Everything that is known about one packet while it is judged.
#[derive(Clone, Copy, Debug)]
pub struct Case<A> {
    /// The packet.
    pub datagram: Datagram<A>,
    /// The policy in force: read once.
    pub live: Live,
    /// Jiffies.
    pub now: u64,
    /// One packet and its bytes.
    pub count: Count,
    /// Direction of the hook.
    pub direction: Direction,
    /// Zone of the hook.
    pub zone: u8,
    /// Key of its flow.
    pub key: FlowKey<A>,
    /// It was sent by the high end of the key.
    pub from_high: bool,
    /// What the packet means for its flow; `None` if there is no flow.
    pub step: Option<Step>,
    /// A flow on its way into a table.
    pub conn: Conn,
    /// Key of its fragments.
    pub fragment_key: FragmentKey,
    /// What its first fragment says.
    pub fragment: Fragment,
    /// What the rules are asked.
    pub question: Question<A>,
    /// The counter of the rule that lets it pass, or why it is dropped.
    pub outcome: Result<u32, Reason>,
}

/// What the rules are asked about: the first packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Ports or ICMP type and code, and protocol ([`cnsmo_common::blob::lanes`]).
    pub lanes: u64,
    /// Whose rules.
    pub direction: Direction,
}

/// A change of a flow in place. A trait and not a closure, because only a method can be told to be inlined always.
pub trait Visit {
    /// Looks at the flow and changes it.
    fn visit(&mut self, conn: &mut Conn);
}

/// Judging a packet in a borrowed [`Case`]. A trait and not a closure, as [`Visit`].
pub trait Work<A> {
    /// The counter of the rule that lets the packet pass, or why it is dropped.
    fn judge(self, case: &mut Case<A>) -> Result<u32, Reason>;
}

/// The tables of one address family.
pub trait FlowTables<A> {
    /// Lends the place where one packet's case is put together: too big for a program's 512 bytes of stack.
    fn with_case(&self, work: impl Work<A>) -> Result<u32, Reason>;
    /// Changes an established flow in place; false if there is none. 107 ns where copying it out and in took 269.
    fn touch_established(&self, key: &FlowKey<A>, visit: &mut impl Visit) -> bool;
    /// Changes a half-open flow in place; false if there is none.
    fn touch_half_open(&self, key: &FlowKey<A>, visit: &mut impl Visit) -> bool;
    /// Remembers a new flow. A flood evicts the oldest half-open flows, never an established one.
    fn insert_half_open(&self, key: &FlowKey<A>, conn: &Conn);
    /// Moves a flow out of a flood's reach. If there is no room it stays half-open, and that is counted.
    fn promote(&self, key: &FlowKey<A>, conn: &Conn);
    /// Forgets a flow in either table.
    fn remove(&self, key: &FlowKey<A>);
    /// The lowest index of a matching rule, `NO_RULE`, or `None` if the policy in the kernel is damaged.
    fn classify(&self, question: &Question<A>, live: Live) -> Option<u32>;
}

/// All tables.
pub trait Tables: FlowTables<[u8; 4]> + FlowTables<[u8; 16]> {
    /// Timeouts and switches.
    fn control(&self) -> Option<&Control>;
    /// The policy in force. To be called once per packet.
    fn live(&self, control: &Control) -> Live;
    /// Jiffies.
    fn now(&self) -> u64;
    /// What rule `index` of the live half does.
    fn rule(&self, index: u32, live: Live) -> Option<RuleAction>;
    /// Adds to the counter of a rule.
    fn count_rule(&self, slot: u32, count: Count);
    /// Adds to a counter of [`cnsmo_common::stat`].
    fn count_stat(&self, stat: u32, count: Count);
    /// Remembers the ports of a first fragment.
    fn remember_fragment(&self, key: &FragmentKey, fragment: &Fragment);
    /// Copies what the first fragment said; false if it was not seen.
    fn recall_fragment(&self, key: &FragmentKey, into: &mut Fragment) -> bool;
}
