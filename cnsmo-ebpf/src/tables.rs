//! What the pipeline asks of its surroundings: maps and clock in the kernel, collections in tests.

use cnsmo_common::{
    Direction,
    balance::{Backend, Ring, Service, ServiceKey},
    control::{BucketKey, Control, Limit, Live, RuleAction},
    flow::{Flow, FlowKey, Fragment, FragmentKey},
    record::Record,
    stat::{Count, Reason},
};

use crate::{connections::Change, conntrack::Step, parse::Datagram};

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
    /// Offset of the IP header.
    pub l3: usize,
    /// Kernel's index of the device that the packet came by; 0: not known.
    pub ifindex: u32,
    /// What its sender on this VM has marked it with.
    pub mark: u32,
    /// The hook can rewrite: new flows to virtual addresses may begin here.
    pub serves: bool,
    /// Key of its flow.
    pub key: FlowKey<A>,
    /// It was sent by the high end of the key.
    pub from_high: bool,
    /// What the packet means for its flow; `None` if there is no flow.
    pub step: Option<Step>,
    /// The packet travels as the flow's first one did.
    pub from_origin: bool,
    /// The flow as it is now; without flags if there is none.
    pub flow: Flow<A>,
    /// Key of the other entry of a translated flow.
    pub twin_key: FlowKey<A>,
    /// The other entry.
    pub twin: Flow<A>,
    /// The virtual address that the packet is for.
    pub service_key: ServiceKey,
    /// What is behind it.
    pub service: Service,
    /// The backend chosen for it.
    pub backend: Backend,
    /// The packet is to be translated as its flow says.
    pub translate: bool,
    /// The packet tells the size of TCP's segments, which must fit into the tunnel.
    pub clamp: bool,
    /// Where it goes after it was rewritten.
    pub onward: Onward,
    /// Key of its fragments.
    pub fragment_key: FragmentKey,
    /// What its first fragment says.
    pub fragment: Fragment,
    /// What the rules are asked.
    pub question: Question<A>,
    /// The counter of the rule that lets it pass, or why it is dropped.
    pub outcome: Result<u32, Reason>,
    /// Bits of [`cnsmo_common::record::why`].
    pub why: u8,
    /// Counter of the rule that decided, if `why` says so.
    pub slot: u32,
    /// The flow begins: limits and the log are for such.
    pub fresh: bool,
    /// Under which the rule that decided counts the open flows of a source; 0: it does not.
    pub group: u16,
    /// What is told of the packet.
    pub record: Record,
    /// The limit of the rule.
    pub limit: Limit,
    /// Whose bucket is asked.
    pub bucket_key: BucketKey,
}

/// Where a rewritten packet goes.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onward {
    /// As it would have.
    Same,
    /// Into the tunnel.
    Tunnel,
    /// Out of the network card that its client came by.
    Client,
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
pub trait Visit<A> {
    /// Looks at the flow and changes it.
    fn visit(&mut self, flow: &mut Flow<A>);
}

/// A word that other CPUs change too.
pub trait Shared {
    /// What it is now.
    fn load(&self) -> u64;
    /// Makes it `after` if it still is `before`, in one step.
    fn exchange(&self, before: u64, after: u64) -> bool;
}

/// A change of a bucket. A trait and not a closure, as [`Visit`].
pub trait VisitBucket {
    /// Looks at the word and changes it.
    fn visit(&mut self, word: &impl Shared);
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
    fn touch_established(&self, key: &FlowKey<A>, visit: &mut impl Visit<A>) -> bool;
    /// Changes a half-open flow in place; false if there is none.
    fn touch_half_open(&self, key: &FlowKey<A>, visit: &mut impl Visit<A>) -> bool;
    /// Remembers a new flow. A flood evicts the oldest half-open flows, never an established one.
    fn insert_half_open(&self, key: &FlowKey<A>, flow: &Flow<A>);
    /// As `insert_half_open`, unless there is a half-open flow of that key: then false.
    fn claim_half_open(&self, key: &FlowKey<A>, flow: &Flow<A>) -> bool;
    /// Moves a flow out of a flood's reach. If there is no room it stays half-open, and that is counted.
    fn promote(&self, key: &FlowKey<A>, flow: &Flow<A>);
    /// Forgets a flow in either table.
    fn remove(&self, key: &FlowKey<A>);
    /// The lowest index of a matching rule, `NO_RULE`, or `None` if the policy in the kernel is damaged.
    fn classify(&self, question: &Question<A>, live: Live) -> Option<u32>;

    /// [`crate::pipeline::decide`]. This and what follows are stages that work on the case alone: in the kernel functions
    /// of their own, which the verifier proves once and not once per way to them.
    fn decide(&self, case: &mut Case<A>, control: &Control, stale: bool);
    /// [`crate::pipeline::decide_again`].
    fn decide_again(&self, case: &mut Case<A>, control: &Control);
    /// [`crate::balance::choose`].
    fn choose(&self, case: &mut Case<A>, control: &Control);
    /// [`crate::balance::attempt`].
    fn attempt(&self, case: &mut Case<A>, control: &Control, place: u32, port: u32);
    /// [`crate::balance::settle`].
    fn settle(&self, case: &mut Case<A>);
    /// [`crate::limit::admit`].
    fn admit(&self, case: &mut Case<A>, place: u16);
    /// [`crate::connections::change`].
    fn change_open(&self, case: &mut Case<A>, change: Change);
    /// [`crate::pipeline::tell`].
    fn tell(&self, case: &mut Case<A>);
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
    /// What the rule with that counter does.
    fn rule_of(&self, slot: u32) -> Option<RuleAction>;
    /// Copies the limit at `place` of the live half; false if there is none.
    fn limit(&self, place: u16, live: Live, into: &mut Limit) -> bool;
    /// Nanoseconds of the monotonic clock.
    fn nanoseconds(&self) -> u64;
    /// Has `visit` called with the bucket; false if there is none.
    fn touch_bucket(&self, key: &BucketKey, visit: &mut impl VisitBucket) -> bool;
    /// Begins a bucket. Full: the one that was not asked for longest is forgotten.
    fn begin_bucket(&self, key: &BucketKey, word: u64);
    /// Has `visit` called with the number of a source's open flows; false if there is none.
    fn touch_open(&self, key: &BucketKey, visit: &mut impl VisitBucket) -> bool;
    /// Begins to count the open flows of a source; false if another CPU was first. Full: the source that was not asked for
    /// longest is forgotten, and may have as many again.
    fn begin_open(&self, key: &BucketKey, word: u64) -> bool;
    /// Whether there is something left of a budget ([`cnsmo_common::record::budget`]), and takes one of it.
    fn spend(&self, budget: u32) -> bool;
    /// Hands a record to the agent. No room: it is lost.
    fn record(&self, record: &Record);
    /// Adds to the counter of a rule.
    fn count_rule(&self, slot: u32, count: Count);
    /// Adds to a counter of [`cnsmo_common::stat`].
    fn count_stat(&self, stat: u32, count: Count);
    /// Remembers the ports of a first fragment.
    fn remember_fragment(&self, key: &FragmentKey, fragment: &Fragment);
    /// Copies what the first fragment said; false if it was not seen.
    fn recall_fragment(&self, key: &FragmentKey, into: &mut Fragment) -> bool;
    /// Copies what is behind a virtual address; false if it is none.
    fn service(&self, key: &ServiceKey, into: &mut Service) -> bool;
    /// The ring in force of the balancer at a place. To be called once per packet.
    fn ring(&self, balancer: u16) -> Ring;
    /// The backend in a slot of all rings.
    fn slot(&self, place: u32) -> u16;
    /// Copies the addresses of a backend; false if there is none.
    fn backend(&self, id: u16, into: &mut Backend) -> bool;
    /// A number that grows with each call, for the balancer at a place.
    fn turn(&self, balancer: u16) -> u32;
}
