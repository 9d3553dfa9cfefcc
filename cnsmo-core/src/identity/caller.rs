//! Who makes a request, and what that one may touch.

use std::sync::Arc;

use tonic::{Request, Status};

use super::{Grants, Kind, Peer, Role, Subject};

/// Keys below it are the core's own: written by the core alone.
pub const RESERVED: &str = "cnsmo/";
/// Of the core's own keys, those that nobody reads through the API.
const SECRETS: [&str; 2] = ["cnsmo/tokens/", "cnsmo/identities/"];

/// Who makes a request. In the extensions of every request that reaches a service.
#[derive(Clone, Debug)]
pub struct Caller {
    /// `<kind>/<name>`; `local/uid-<n>` over the unix socket; `anonymous`.
    pub identity: Arc<str>,
    /// What it is.
    pub role: Role,
    grants: Arc<Grants>,
    peer: Option<Arc<Peer>>,
}

impl Caller {
    /// Came over the unix socket.
    pub fn local(uid: u32) -> Self {
        let identity = format!("local/uid-{uid}").into();
        Self { identity, role: Role::Admin, grants: Arc::default(), peer: None }
    }

    /// Came without a certificate.
    pub fn anonymous() -> Self {
        let identity = "anonymous".into();
        Self { identity, role: Role::Anonymous, grants: Arc::default(), peer: None }
    }

    /// Has a certificate.
    pub fn certified(peer: Arc<Peer>, role: Role, grants: Arc<Grants>) -> Self {
        Self { identity: peer.identity.as_str().into(), role, grants, peer: Some(peer) }
    }

    /// Has a certificate that opens nothing.
    pub fn unproven(peer: Arc<Peer>) -> Self {
        Self::certified(peer, Role::Anonymous, Arc::default())
    }

    /// The caller of a request.
    ///
    /// # Errors
    /// The request did not come through [`crate::grpc::auth`].
    pub fn of<T>(request: &Request<T>) -> Result<&Self, Status> {
        let caller = request.extensions().get::<Self>();
        caller.ok_or_else(|| Status::unauthenticated("the request has no identity"))
    }

    /// What its certificate says; none: it has none.
    pub fn peer(&self) -> Option<&Peer> {
        self.peer.as_deref()
    }

    /// The name in its certificate, if it is of this kind.
    pub fn name_as(&self, kind: Kind) -> Option<&str> {
        let subject: &Subject = &self.peer.as_ref()?.subject;
        (subject.kind == kind).then(|| subject.name.as_str())
    }

    /// Whether it may read this key. Secrets of the core nobody may.
    pub fn may_read_key(&self, key: &str) -> bool {
        if SECRETS.iter().any(|secret| key.starts_with(secret)) {
            return false;
        }
        match self.role {
            Role::Viewer | Role::Admin | Role::Core => true,
            Role::Editor => key.starts_with(RESERVED) || self.owns(key),
            Role::Service => self.owns(key),
            Role::Agent => self.name_as(Kind::Agent).is_some_and(|name| {
                key.strip_prefix("cnsmo/nodes/") == Some(name) || below(key, "agents/", name)
            }),
            Role::Anonymous => false,
        }
    }

    /// Whether it may read all keys with this prefix, secrets excepted.
    pub fn may_read_prefix(&self, prefix: &str) -> bool {
        match self.role {
            Role::Viewer | Role::Admin | Role::Core => true,
            // All keys with the prefix begin as the prefix does.
            Role::Editor if self.grants.state_prefixes.is_empty() => true,
            Role::Editor | Role::Service => self.may_read_key(prefix),
            Role::Agent => {
                self.name_as(Kind::Agent).is_some_and(|name| below(prefix, "agents/", name))
            }
            Role::Anonymous => false,
        }
    }

    /// Whether it may write this key. Those of the core nobody may.
    pub fn may_write_key(&self, key: &str) -> bool {
        if key.starts_with(RESERVED) {
            return false;
        }
        match self.role {
            Role::Admin | Role::Core => true,
            Role::Editor | Role::Service => self.owns(key),
            Role::Agent => {
                self.name_as(Kind::Agent).is_some_and(|name| below(key, "agents/", name))
            }
            Role::Viewer | Role::Anonymous => false,
        }
    }

    /// Whether it may write all keys with this prefix. An empty one, and any that reserved keys begin with, nobody may.
    pub fn may_write_prefix(&self, prefix: &str) -> bool {
        !RESERVED.starts_with(prefix) && self.may_write_key(prefix)
    }

    /// Whether it may publish to this subject, or send a request there.
    pub fn may_publish(&self, subject: &str) -> bool {
        self.has_subject(subject)
    }

    /// Whether it may see all that this pattern matches.
    pub fn may_subscribe(&self, pattern: &str) -> bool {
        self.has_subject(pattern)
    }

    /// An editor without prefixes has all, a service has its own.
    fn owns(&self, key: &str) -> bool {
        let prefixes = &self.grants.state_prefixes;
        if prefixes.is_empty() {
            return match self.role {
                Role::Editor => true,
                _ => self
                    .name_as(Kind::Service)
                    .is_some_and(|name| key.strip_prefix(name).is_some_and(|k| k.starts_with('/'))),
            };
        }
        prefixes.iter().any(|prefix| key.starts_with(prefix.as_str()))
    }

    fn has_subject(&self, asked: &str) -> bool {
        let granted = &self.grants.subjects;
        match self.role {
            Role::Admin | Role::Core => true,
            Role::Editor if granted.is_empty() => true,
            Role::Editor | Role::Service if !granted.is_empty() => {
                granted.iter().any(|pattern| covers(pattern, asked))
            }
            Role::Service => self.name_as(Kind::Service).is_some_and(|name| {
                let own = [name.to_owned(), format!("svc.{name}")];
                own.iter().any(|own| asked == own || covers(&format!("{own}.>"), asked))
            }),
            Role::Agent => self
                .name_as(Kind::Agent)
                .is_some_and(|name| covers(&format!("agent.{name}.>"), asked)),
            Role::Editor | Role::Viewer | Role::Anonymous => false,
        }
    }
}

fn below(key: &str, folder: &str, name: &str) -> bool {
    let rest = key.strip_prefix(folder).and_then(|rest| rest.strip_prefix(name));
    rest.is_some_and(|rest| rest.starts_with('/'))
}

/// Whether whatever `asked`, a subject or a pattern, matches is matched by `granted` too. `*` stands for one token, `>` at
/// the end for one or more.
fn covers(granted: &str, asked: &str) -> bool {
    let mut asked = asked.split('.');
    for token in granted.split('.') {
        match (token, asked.next()) {
            (_, None) | ("*", Some(">")) => return false,
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (token, Some(asked)) if token == asked => {}
            (_, Some(_)) => return false,
        }
    }
    asked.next().is_none()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn caller(identity: &str, role: Role, grants: Grants) -> Caller {
        let subject = Subject::parse(identity).unwrap();
        let peer = Peer { identity: identity.into(), subject, spki_sha256: [0; 32] };
        Caller::certified(Arc::new(peer), role, Arc::new(grants))
    }

    fn all() -> [Caller; 6] {
        [
            ("agent/web-1", Role::Agent),
            ("service/shop", Role::Service),
            ("operator/eve", Role::Viewer),
            ("operator/ed", Role::Editor),
            ("operator/ada", Role::Admin),
            ("core/c1", Role::Core),
        ]
        .map(|(identity, role)| caller(identity, role, Grants::default()))
    }

    /// For agent, service, viewer, editor, admin, core: r reads, w reads and writes.
    #[test]
    fn each_role_has_its_keys() {
        for (key, may) in [
            ("shop/cart", "-wrwww"),
            ("shopping/cart", "--rwww"),
            ("agents/web-1/x", "w-rwww"),
            ("agents/web-10/x", "--rwww"),
            ("cnsmo/nodes/web-1", "r-rrrr"),
            ("cnsmo/nodes/web-10", "--rrrr"),
            ("cnsmo/tokens/x", "------"),
            ("cnsmo/identities/agent/web-1", "------"),
        ] {
            let seen: String = all()
                .iter()
                .map(|caller| match (caller.may_read_key(key), caller.may_write_key(key)) {
                    (true, true) => 'w',
                    (true, false) => 'r',
                    (false, false) => '-',
                    (false, true) => '!',
                })
                .collect();
            assert_eq!(seen, may, "{key}");
        }
        let [agent, service, viewer, editor, admin, _] = all();
        assert!(!Caller::anonymous().may_read_key("x") && Caller::local(0).may_write_key("x"));
        assert!(service.may_read_prefix("shop/") && !service.may_read_prefix("shop"));
        assert!(!service.may_read_prefix("") && !agent.may_read_prefix("agents/"));
        assert!(viewer.may_read_prefix("") && editor.may_read_prefix(""));
        for prefix in ["", "c", "cnsmo", "cnsmo/", "cnsmo/x"] {
            assert!(!admin.may_write_prefix(prefix), "{prefix}");
        }
        assert!(admin.may_write_prefix("cnsmox") && service.may_write_prefix("shop/"));
        assert!(!viewer.may_write_prefix("shop/"));
    }

    #[test]
    fn a_token_says_what_else_a_service_may() {
        let grants = Grants {
            state_prefixes: vec!["stock/".into()],
            subjects: vec!["orders.*".into(), "svc.stock.>".into()],
        };
        let service = caller("service/shop", Role::Service, grants);
        assert!(service.may_write_key("stock/1") && !service.may_write_key("shop/1"));
        assert!(service.may_publish("orders.new") && !service.may_publish("orders.new.eu"));
        assert!(service.may_subscribe("orders.*") && !service.may_subscribe("orders.>"));
        assert!(!service.may_publish("shop.x"));
        let [agent, service, viewer, editor, ..] = all();
        assert!(service.may_subscribe("svc.shop") && service.may_publish("svc.shop.1"));
        assert!(service.may_subscribe("shop.>") && !service.may_subscribe(">"));
        assert!(!service.may_publish("svc.shopping") && !service.may_subscribe("svc.*"));
        assert!(agent.may_publish("agent.web-1.log") && !agent.may_publish("agent.web-2.log"));
        assert!(!viewer.may_subscribe("x") && editor.may_subscribe(">"));
    }

    proptest! {
        /// What a pattern covers, it matches: for any subject that the covered one matches.
        #[test]
        fn what_is_covered_is_matched(
            granted in "([ab*]\\.){0,3}[ab*>]", asked in "([ab*]\\.){0,3}[ab*>]",
            subject in "([ab]\\.){0,4}[ab]",
        ) {
            if covers(&granted, &asked) && covers(&asked, &subject) {
                prop_assert!(covers(&granted, &subject));
            }
        }

        #[test]
        fn no_text_makes_it_panic(granted in ".{0,20}", asked in ".{0,20}") {
            covers(&granted, &asked);
        }
    }
}
