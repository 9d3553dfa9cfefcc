//! All chains of a direction as one list in which the first match decides.

use std::rc::Rc;

use anyhow::{Result, bail};
use cnsmo_proto::model::{Action, Direction};

use super::{
    ir::{Base, ChainId, Limit, Origin, Rule, RuleSet, Verdict},
    sets::{Match, device},
};

/// Chains called by chains; nftables allows 16, and a circle has no end.
const DEPTH_MAX: usize = 32;
/// Rules looked at, pairs of rules of two chains, and ranges kept. Some seconds and some hundred megabytes.
const WORK_MAX: usize = 4_000_000;

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) matches: Match,
    pub(super) decides: Decides,
    pub(super) log: bool,
    pub(super) limit: Option<Limit>,
    pub(super) origin: Rc<Origin>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decides {
    Action(Action),
    /// Not translated: what it was, and why not. It decides nothing.
    Lost(Lost, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    Accept,
    Deny,
    /// It lets other rules decide, or nobody knows.
    Other,
    /// It has no say in what passes.
    Nothing,
}

/// Every packet of the direction is matched by one that decides.
pub(super) fn flatten(set: &RuleSet, direction: Direction) -> Result<Vec<Entry>> {
    let mut bases: Vec<_> = set.bases.iter().filter(|base| base.direction == direction).collect();
    bases.sort_by_key(|base| base.priority);
    let mut work = Work { set, left: WORK_MAX, entries: vec![] };
    let mut all: Option<Vec<Entry>> = None;
    for base in bases {
        let list = work.base(base)?;
        all = Some(match all {
            None => list,
            Some(before) => work.both(&before, &list)?,
        });
    }
    Ok(all.unwrap_or_else(|| vec![nothing_there(universe(direction), direction)]))
}

/// All packets of a direction.
pub(super) fn universe(direction: Direction) -> Match {
    let devices = device::of(direction, &[device::LOOPBACK, device::CARD]);
    devices.into_iter().fold(Match::all(), |all, (field, set)| all.with(field, set))
}

/// Without a chain for it a packet passes.
fn nothing_there(matches: Match, direction: Direction) -> Entry {
    let origin = Origin {
        place: String::new(),
        text: String::new(),
        name: format!("{direction}-open"),
        is_policy: true,
    };
    let decides = Decides::Action(Action::Allow);
    Entry { matches, decides, log: false, limit: None, origin: Rc::new(origin) }
}

struct Work<'a> {
    set: &'a RuleSet,
    left: usize,
    entries: Vec<Entry>,
}

impl Work<'_> {
    fn charge(&mut self, cost: usize) -> Result<()> {
        match self.left.checked_sub(cost) {
            Some(left) => self.left = left,
            None => bail!("the chains call each other too often: they are too many rules in a row"),
        }
        Ok(())
    }

    /// One chain of the kernel, and packets that do not come there.
    fn base(&mut self, base: &Base) -> Result<Vec<Entry>> {
        let all = universe(base.direction);
        let Some(here) = all.and(&Match::families(base.families.0, base.families.1)) else {
            return Ok(vec![nothing_there(all, base.direction)]);
        };
        let policy = policy(base);
        let call = Call { policy: Some(&policy), doubt: None, depth: 0 };
        self.walk(&base.chain, vec![here.clone()], &call)?;
        self.push(here.clone(), policy)?;
        for others in all.minus(&here) {
            self.entries.push(nothing_there(others, base.direction));
        }
        Ok(std::mem::take(&mut self.entries))
    }

    fn push(&mut self, matches: Match, what: Entry) -> Result<()> {
        self.charge(1 + matches.size())?;
        self.entries.push(Entry { matches, ..what });
        Ok(())
    }

    /// The rules of a chain for packets of `here`, which shrinks as packets leave the chain undecided.
    fn walk(&mut self, chain: &ChainId, mut here: Vec<Match>, call: &Call<'_>) -> Result<()> {
        if call.depth > DEPTH_MAX {
            bail!("{chain}: chains call each other in a circle, or more than {DEPTH_MAX} deep");
        }
        let Some(rules) = self.set.chains.get(chain) else {
            bail!("{chain}: a rule leads to this chain, which is not there");
        };
        for rule in rules {
            self.charge(1 + here.len() * rule.matches.len())?;
            let pairs = here.iter().flat_map(|a| rule.matches.iter().map(move |b| a.and(b)));
            let matched: Vec<_> = pairs.flatten().collect();
            if matched.is_empty() {
                continue;
            }
            if self.rule(rule, matched, call)? {
                let mut rest = vec![];
                for matches in here {
                    rest.extend(without(matches, &rule.matches));
                }
                here = rest;
                self.charge(here.iter().map(Match::size).sum())?;
            }
            if here.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Whether what it matches leaves the chain undecided.
    fn rule(&mut self, rule: &Rule, matched: Vec<Match>, call: &Call<'_>) -> Result<bool> {
        let leads = matches!(rule.verdict, Verdict::Return | Verdict::Jump(_) | Verdict::Goto(_));
        let narrow = (leads && matched.iter().any(|one| one.narrow)).then(|| FLAGS.to_owned());
        let own = rule.doubt.clone().or(narrow);
        let doubt = own.clone().or_else(|| call.doubt.clone());
        let decide = |action, lost| match &doubt {
            None => Decides::Action(action),
            Some(reason) => Decides::Lost(lost, reason.clone()),
        };
        let lost = |reason: &str| Decides::Lost(Lost::Other, reason.to_owned());
        let decides = match &rule.verdict {
            Verdict::Accept => decide(Action::Allow, Lost::Accept),
            Verdict::Drop => decide(Action::Deny, Lost::Deny),
            Verdict::Reject => decide(Action::Reject, Lost::Deny),
            Verdict::Continue => {
                let reason = doubt.unwrap_or_else(|| "it decides nothing".to_owned());
                Decides::Lost(Lost::Nothing, reason)
            }
            Verdict::Unknown(reason) => lost(reason),
            Verdict::Return | Verdict::Goto(_) if own.is_some() => {
                lost(own.as_deref().unwrap_or_default())
            }
            Verdict::Return => return self.leaves(&matched, call),
            Verdict::Goto(target) => {
                self.call(target, matched.clone(), doubt, call)?;
                return self.leaves(&matched, call);
            }
            Verdict::Jump(target) => {
                self.call(target, matched, doubt, call)?;
                return Ok(false);
            }
        };
        for matches in matched {
            let origin = Rc::clone(&rule.origin);
            let (log, limit) = (rule.log, rule.limit);
            let entry = Entry { matches, decides: decides.clone(), log, limit, origin };
            self.push(entry.matches.clone(), entry)?;
        }
        Ok(false)
    }

    fn call(
        &mut self,
        target: &ChainId,
        matched: Vec<Match>,
        doubt: Option<String>,
        call: &Call<'_>,
    ) -> Result<()> {
        self.walk(target, matched, &Call { policy: None, doubt, depth: call.depth + 1 })
    }

    /// In a chain of the kernel what leaves it goes by the policy; elsewhere by the rules behind the call, and is undecided.
    fn leaves(&mut self, matched: &[Match], call: &Call<'_>) -> Result<bool> {
        let Some(policy) = call.policy else { return Ok(true) };
        for matches in matched {
            self.push(matches.clone(), policy.clone())?;
        }
        Ok(false)
    }

    /// Two chains one behind the other: what the first accepts, the second judges.
    fn both(&mut self, first: &[Entry], second: &[Entry]) -> Result<Vec<Entry>> {
        for a in first {
            if a.decides != Decides::Action(Action::Allow) {
                self.push(a.matches.clone(), a.clone())?;
            } else if a.limit.is_some() {
                self.limited(a, second)?;
            } else {
                for b in second {
                    self.charge(1)?;
                    let Some(matches) = a.matches.and(&b.matches) else { continue };
                    let accepts = b.decides == Decides::Action(Action::Allow);
                    let which = if accepts && b.origin.is_policy { a } else { b };
                    self.push(matches, Entry { log: a.log || b.log, ..which.clone() })?;
                }
            }
        }
        Ok(std::mem::take(&mut self.entries))
    }

    /// It stays whole or goes whole: parts of it would have a limit each.
    fn limited(&mut self, a: &Entry, second: &[Entry]) -> Result<()> {
        self.charge(second.len())?;
        let stops = |b: &&Entry| {
            let accepts = b.decides == Decides::Action(Action::Allow) && b.limit.is_none();
            !accepts && a.matches.and(&b.matches).is_some()
        };
        let decides = if second.iter().any(|b| stops(&b)) {
            let reason = "a second chain judges what its limit lets pass".to_owned();
            Decides::Lost(Lost::Accept, reason)
        } else {
            a.decides.clone()
        };
        self.push(a.matches.clone(), Entry { decides, ..a.clone() })
    }
}

const FLAGS: &str = "it depends on TCP flags";

/// How a chain was called.
struct Call<'a> {
    /// For what leaves a chain of the kernel undecided.
    policy: Option<&'a Entry>,
    /// Why a packet that is said to come here may not.
    doubt: Option<String>,
    depth: usize,
}

fn policy(base: &Base) -> Entry {
    let action = if base.drops { Action::Deny } else { Action::Allow };
    let origin = Rc::clone(&base.origin);
    let decides = Decides::Action(action);
    Entry { matches: Match::all(), decides, log: false, limit: None, origin }
}

/// What none of `others` has.
pub(super) fn without(matches: Match, others: &[Match]) -> Vec<Match> {
    let mut rest = vec![matches];
    for other in others {
        rest = rest.iter().flat_map(|one| one.minus(other)).collect();
    }
    rest
}
