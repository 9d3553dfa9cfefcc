//! Asking the programs about a packet.

use std::net::{IpAddr, SocketAddr};

use cnsmo_common::{
    control::{SLOT_DEFAULT_EGRESS, SLOT_DEFAULT_INGRESS},
    explain::{Explanation, NO_ANSWER, PASSES},
    flow::state,
    record::why,
    stat::Reason,
};
use cnsmo_proto::model::{Direction, Name};

use super::{Kernel, KernelError};
use crate::explain::{Answer, Decider, Question};

impl Kernel {
    /// Runs the pipeline over the live maps, on a copy of whatever it would change.
    pub(super) fn ask(&mut self, question: &Question) -> Result<Answer, KernelError> {
        let is_guarded =
            if question.overlay { self.tunnel.is_some() } else { !self.attachments.is_empty() };
        if !is_guarded {
            return Ok(Answer { unguarded: true, ..Answer::default() });
        }
        let program = match (question.overlay, question.direction) {
            (false, Direction::Ingress) => "explain_nic_ingress",
            (false, Direction::Egress) => "explain_nic_egress",
            (true, Direction::Ingress) => "explain_tunnel_ingress",
            (true, Direction::Egress) => "explain_tunnel_egress",
        };
        self.test_run(program, &question.packet())?;
        let said = self.explanation.read(0, 1)[0];
        if said.outcome == NO_ANSWER {
            return Err(KernelError::Refused(format!("{program} has no answer")));
        }
        Ok(self.in_words(question, &said))
    }

    fn in_words(&self, question: &Question, said: &Explanation) -> Answer {
        let reason = Reason::ALL.into_iter().find(|reason| *reason as u32 == said.outcome);
        let dropped = reason.filter(|_| said.outcome != PASSES);
        let decided = said.why & why::RULE != 0 || said.known != 0;
        let translated = [(said.src, said.sport), (said.dst, said.dport)].map(|(bytes, port)| {
            let ip = if question.src.is_ipv4() {
                IpAddr::from([bytes[12], bytes[13], bytes[14], bytes[15]])
            } else {
                IpAddr::from(bytes)
            };
            SocketAddr::new(ip, u16::from_be_bytes(port))
        });
        Answer {
            unguarded: false,
            dropped: dropped.map(Reason::as_str),
            rejected: dropped.is_some() && said.why & why::ANSWER != 0,
            audited: said.why & why::AUDIT != 0,
            by: if decided { self.decider(said.slot) } else { Decider::Nothing },
            flow: (said.known != 0).then(|| state_word(said.conn.state)),
            translated: (said.translated != 0).then_some(translated),
            balancer: if said.balanced != 0 { self.balancer_of(question) } else { None },
        }
    }

    pub(super) fn decider(&self, slot: u32) -> Decider {
        if slot == SLOT_DEFAULT_INGRESS || slot == SLOT_DEFAULT_EGRESS {
            return Decider::Default;
        }
        // Of the policy before: its rules are not known any more.
        let index = slot.checked_sub(self.first_slot(self.live.half));
        match index.and_then(|index| self.rules_in_force.get(index as usize)) {
            Some((policy, rule)) => Decider::Rule(policy.clone(), rule.clone()),
            None => Decider::Nothing,
        }
    }

    fn balancer_of(&self, question: &Question) -> Option<Name> {
        self.plan.as_ref()?.balancer_at(question.dst.ip())
    }
}

pub(super) fn state_word(number: u8) -> &'static str {
    match number {
        state::SYN_SENT | state::SYN_RECV => "opening",
        state::ESTABLISHED => "established",
        state::FIN_WAIT | state::TIME_WAIT => "closing",
        state::CLOSED => "closed",
        state::UNREPLIED => "unreplied",
        state::ECHOED => "echoed",
        _ => "replied",
    }
}
