//! The conversation with the core.
//!
//! [`Session`] is the protocol without the network: what may be said when. `driver` carries it.

mod driver;

use std::{collections::BTreeMap, time::Duration};

use cnsmo_proto::{
    model::Labels,
    pb::agent::{
        Ack, Announcement, CommandResult, ConnectRequest, ConnectResponse, Heartbeat, Hello,
        InstanceReport, StatusReport, TypeState, Update, Welcome, command::Command,
        connect_request::Message as Up, connect_response::Message as Down,
    },
};

pub use driver::{Connection, run};

/// Of agent.proto as it is here.
pub const PROTOCOL_VERSION: u32 = 1;
/// A core that asks for more often would keep the VM busy with it.
const HEARTBEAT_MIN: Duration = Duration::from_millis(100);
/// A core that asks for less often would not notice a dead VM for longer.
const HEARTBEAT_MAX: Duration = Duration::from_secs(60);
/// Longest time for which a change that nobody confirms stays in force.
const CONFIRM_WINDOW_MAX: Duration = Duration::from_secs(600);

/// A core that asks for more would do without the VM for longer than one that vanished.
const DELAY_MAX: Duration = Duration::from_secs(60);

/// One stream's state.
#[derive(Debug, Default)]
pub struct Session {
    welcomed: Option<Welcomed>,
    last_nonce: u64,
    heartbeats: u64,
}

/// What the core said at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcomed {
    /// Of the store that the stream's revisions belong to.
    pub store_epoch: u64,
    /// How often the core wants to hear of us.
    pub heartbeat_interval: Duration,
    /// How long a change may stay in force without a word of the core about it; zero: for ever.
    pub confirm_window: Duration,
}

/// What a message of the core asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The conversation begins.
    Welcomed(Welcomed),
    /// The core stops: it asks for no connection before this time is over.
    GoAway(Duration),
    /// To be carried out and acknowledged.
    Update {
        /// Of the stream.
        store_epoch: u64,
        /// As sent.
        update: Update,
    },
    /// The core knows that this revision is in force.
    Confirm(i64),
    /// To be carried out and answered.
    Command {
        /// Of the answer.
        id: u64,
        /// As sent.
        command: Command,
    },
}

/// The core does not keep to the protocol; the stream is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The core speaks another version.
    #[error("the core speaks protocol version {0}, this agent {PROTOCOL_VERSION}")]
    Version(u32),
    /// Something else came first.
    #[error("the first message is not a welcome")]
    NoWelcome,
    /// It came again.
    #[error("a second welcome on one stream")]
    SecondWelcome,
    /// No message, or one of a kind that this agent does not know.
    #[error("an empty message")]
    Empty,
    /// Nonces must increase.
    #[error("nonce {nonce} after {last}")]
    Nonce {
        /// Of the update.
        nonce: u64,
        /// Of the one before.
        last: u64,
    },
}

impl Session {
    /// The first message. Resets the session: it belongs to one stream.
    pub fn hello(
        &mut self,
        boot_id: String,
        have: BTreeMap<String, TypeState>,
        labels: &Labels,
        announcement: Option<Announcement>,
    ) -> ConnectRequest {
        *self = Self::default();
        let labels = labels.as_map().clone();
        up(Up::Hello(Hello {
            boot_id,
            protocol_version: PROTOCOL_VERSION,
            have,
            labels,
            announcement,
        }))
    }

    /// Takes a message of the core.
    ///
    /// # Errors
    /// See [`ProtocolError`].
    pub fn receive(&mut self, message: ConnectResponse) -> Result<Event, ProtocolError> {
        match (message.message.ok_or(ProtocolError::Empty)?, self.welcomed) {
            (Down::Welcome(welcome), None) => {
                let welcomed = Welcomed::try_from(welcome)?;
                self.welcomed = Some(welcomed);
                Ok(Event::Welcomed(welcomed))
            }
            (Down::Welcome(_), Some(_)) => Err(ProtocolError::SecondWelcome),
            (Down::GoAway(go_away), _) => {
                let asked = go_away.delay.and_then(|d| Duration::try_from(d).ok());
                Ok(Event::GoAway(asked.unwrap_or_default().min(DELAY_MAX)))
            }
            (Down::Command(_), None) => Err(ProtocolError::NoWelcome),
            (Down::Command(asked), Some(_)) => {
                let command = asked.command.ok_or(ProtocolError::Empty)?;
                Ok(Event::Command { id: asked.id, command })
            }
            (Down::Update(_) | Down::Confirm(_), None) => Err(ProtocolError::NoWelcome),
            (Down::Confirm(confirm), Some(_)) => Ok(Event::Confirm(confirm.revision)),
            (Down::Update(update), Some(Welcomed { store_epoch, .. })) => {
                if update.nonce <= self.last_nonce {
                    let (nonce, last) = (update.nonce, self.last_nonce);
                    return Err(ProtocolError::Nonce { nonce, last });
                }
                self.last_nonce = update.nonce;
                Ok(Event::Update { store_epoch, update })
            }
        }
    }

    /// Renews the lease and shows what is in force.
    pub fn heartbeat(&mut self, applied: BTreeMap<String, TypeState>) -> ConnectRequest {
        self.heartbeats += 1;
        up(Up::Heartbeat(Heartbeat { sequence: self.heartbeats, applied }))
    }

    /// The answer to an update.
    pub fn ack(ack: Ack) -> ConnectRequest {
        up(Up::Ack(ack))
    }

    /// What peers must know of this VM, where it has changed.
    pub fn announcement(announcement: Announcement) -> ConnectRequest {
        up(Up::Announcement(announcement))
    }

    /// Services of this VM.
    pub fn instances(report: InstanceReport) -> ConnectRequest {
        up(Up::Instances(report))
    }

    /// The answer to a command.
    pub fn result(result: CommandResult) -> ConnectRequest {
        up(Up::Result(Box::new(result)))
    }

    /// The latest state of the VM.
    pub fn status(report: StatusReport) -> ConnectRequest {
        up(Up::Status(Box::new(report)))
    }
}

impl TryFrom<Welcome> for Welcomed {
    type Error = ProtocolError;

    fn try_from(welcome: Welcome) -> Result<Self, ProtocolError> {
        if welcome.protocol_version != PROTOCOL_VERSION {
            return Err(ProtocolError::Version(welcome.protocol_version));
        }
        let asked = welcome.heartbeat_interval.and_then(|d| Duration::try_from(d).ok());
        let heartbeat_interval = asked.unwrap_or_default().clamp(HEARTBEAT_MIN, HEARTBEAT_MAX);
        let confirm_window = welcome.confirm_window.and_then(|d| Duration::try_from(d).ok());
        let confirm_window = match confirm_window.unwrap_or_default() {
            Duration::ZERO => Duration::ZERO,
            // Nobody can be heard of more often than he speaks.
            window => window.clamp(heartbeat_interval * 2, CONFIRM_WINDOW_MAX),
        };
        Ok(Self { store_epoch: welcome.store_epoch, heartbeat_interval, confirm_window })
    }
}

fn up(message: Up) -> ConnectRequest {
    ConnectRequest { message: Some(message) }
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::pb::agent::GoAway;

    use super::*;

    fn down(message: Down) -> ConnectResponse {
        ConnectResponse { message: Some(message) }
    }

    fn welcome() -> ConnectResponse {
        let heartbeat_interval = Some(prost_types::Duration { seconds: 3, nanos: 0 });
        let protocol_version = PROTOCOL_VERSION;
        down(Down::Welcome(Welcome {
            store_epoch: 9,
            heartbeat_interval,
            protocol_version,
            ..Default::default()
        }))
    }

    fn update(nonce: u64) -> ConnectResponse {
        down(Down::Update(Update { nonce, ..Update::default() }))
    }

    #[test]
    fn updates_come_after_the_welcome_with_its_epoch_and_rising_nonces() {
        let mut session = Session::default();
        let heartbeat_interval = Duration::from_secs(3);
        let confirm_window = Duration::ZERO;
        let welcomed = Welcomed { store_epoch: 9, heartbeat_interval, confirm_window };
        assert_eq!(session.receive(welcome()), Ok(Event::Welcomed(welcomed)));
        assert!(matches!(session.receive(update(1)), Ok(Event::Update { store_epoch: 9, .. })));
        assert!(session.receive(update(5)).is_ok());
        assert_eq!(session.receive(update(5)), Err(ProtocolError::Nonce { nonce: 5, last: 5 }));
        assert_eq!(session.receive(welcome()), Err(ProtocolError::SecondWelcome));
    }

    #[test]
    fn a_core_that_does_not_keep_to_the_protocol_is_refused() {
        assert_eq!(Session::default().receive(update(1)), Err(ProtocolError::NoWelcome));
        let empty = ConnectResponse { message: None };
        assert_eq!(Session::default().receive(empty), Err(ProtocolError::Empty));
        let other = down(Down::Welcome(Welcome { protocol_version: 2, ..Default::default() }));
        assert_eq!(Session::default().receive(other), Err(ProtocolError::Version(2)));
    }

    #[test]
    fn no_heartbeat_interval_floods_or_silences() {
        for (asked, taken) in [
            (None, HEARTBEAT_MIN),
            (Some((0, 1)), HEARTBEAT_MIN),
            (Some((-5, 0)), HEARTBEAT_MIN),
            (Some((1 << 40, 0)), HEARTBEAT_MAX),
        ] {
            let heartbeat_interval =
                asked.map(|(seconds, nanos)| prost_types::Duration { seconds, nanos });
            let protocol_version = PROTOCOL_VERSION;
            let welcome = Welcome { heartbeat_interval, protocol_version, ..Default::default() };
            assert_eq!(Welcomed::try_from(welcome).unwrap().heartbeat_interval, taken);
        }
    }

    #[test]
    fn a_core_that_stops_is_left_alone_for_as_long_as_it_asks_within_reason() {
        let asked = |delay| {
            let delay = Some(delay);
            Session::default().receive(down(Down::GoAway(GoAway { delay })))
        };
        let seconds = |seconds| prost_types::Duration { seconds, nanos: 0 };
        assert_eq!(asked(seconds(7)), Ok(Event::GoAway(Duration::from_secs(7))));
        assert_eq!(asked(seconds(1 << 40)), Ok(Event::GoAway(DELAY_MAX)));
        assert_eq!(asked(seconds(-1)), Ok(Event::GoAway(Duration::ZERO)));
    }

    #[test]
    fn a_new_stream_starts_over() {
        let mut session = Session::default();
        session.receive(welcome()).unwrap();
        session.receive(update(7)).unwrap();
        session.heartbeat(BTreeMap::new());
        session.hello(String::new(), BTreeMap::new(), &Labels::default(), None);
        assert!(session.receive(welcome()).is_ok());
        assert!(session.receive(update(1)).is_ok());
        let Some(Up::Heartbeat(beat)) = session.heartbeat(BTreeMap::new()).message else {
            panic!("not a heartbeat")
        };
        assert_eq!(beat.sequence, 1);
    }
}
