//! Rule sets as both front ends read them: chains of rules, and the hooks that they hang on.

use std::{collections::BTreeMap, rc::Rc};

use cnsmo_proto::model::Direction;

use super::sets::Match;

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct RuleSet {
    pub(super) chains: BTreeMap<ChainId, Vec<Rule>>,
    pub(super) bases: Vec<Base>,
    /// What is known not to be translated before a rule is looked at.
    pub(super) left: Vec<Left>,
    pub(super) notes: Vec<String>,
}

/// Family, table and name; unique over all files of one import.
pub(super) type ChainId = String;

/// A chain that the kernel calls for packets to or from the machine.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) direction: Direction,
    /// Whether IPv4 and IPv6 packets come here.
    pub(super) families: (bool, bool),
    /// Lower is called first.
    pub(super) priority: i64,
    /// Else what no rule decides is accepted.
    pub(super) drops: bool,
    pub(super) chain: ChainId,
    pub(super) origin: Rc<Origin>,
}

/// Where something was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// File, and line or chain and handle.
    pub(super) place: String,
    /// The rule as it was written.
    pub(super) text: String,
    /// Before it is made a valid name.
    pub(super) name: String,
    /// The policy of a chain, not one of its rules.
    pub(super) is_policy: bool,
}

#[derive(Debug)]
pub(super) struct Rule {
    pub(super) origin: Rc<Origin>,
    /// It matches what any of these does.
    pub(super) matches: Vec<Match>,
    /// Why it matches less than `matches` say.
    pub(super) doubt: Option<String>,
    pub(super) limit: Option<Limit>,
    pub(super) log: bool,
    pub(super) verdict: Verdict,
}

/// New flows: more do not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) flows: u32,
    pub(super) period_seconds: u32,
    pub(super) burst: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    Drop,
    Reject,
    Return,
    Jump(ChainId),
    Goto(ChainId),
    /// On to the next rule, whatever else the rule does.
    Continue,
    /// Nobody here knows; why.
    Unknown(String),
}

/// What the policy does not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) place: String,
    pub(super) rule: String,
    pub(super) reason: String,
    pub(super) effect: Effect,
}

/// Of leaving something out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Effect {
    /// What the machine accepts stays the same.
    None,
    /// It accepts less.
    Stricter,
    /// It accepts more.
    Wider,
}

impl Effect {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Stricter => "stricter",
            Self::Wider => "wider",
        }
    }
}

impl RuleSet {
    /// Whether a packet can end in the chain, or where it leads.
    pub(super) fn can_drop(&self, chain: &ChainId) -> bool {
        let (mut seen, mut open) = (vec![], vec![chain]);
        while let Some(chain) = open.pop() {
            if seen.contains(&chain) {
                continue;
            }
            seen.push(chain);
            for rule in self.chains.get(chain).into_iter().flatten() {
                match &rule.verdict {
                    Verdict::Drop | Verdict::Reject | Verdict::Unknown(_) => return true,
                    Verdict::Jump(target) | Verdict::Goto(target) => open.push(target),
                    Verdict::Accept | Verdict::Return | Verdict::Continue => {}
                }
            }
        }
        false
    }

    pub(super) fn merge(&mut self, other: Self) {
        self.chains.extend(other.chains);
        self.bases.extend(other.bases);
        self.left.extend(other.left);
        self.notes.extend(other.notes);
    }
}
