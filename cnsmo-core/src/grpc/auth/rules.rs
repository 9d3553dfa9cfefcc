//! Every RPC and who may call it. What is not here, nobody may.

use crate::identity::Role::{self, Admin, Agent, Anonymous, Core, Editor, Service, Viewer};

/// Everybody with a certificate, and the operators of this machine.
const KNOWN: &[Role] = &[Agent, Service, Viewer, Editor, Admin, Core];
/// Those who use state and bus as far as their grants go.
const USERS: &[Role] = &[Agent, Service, Editor, Admin, Core];
/// Those who look.
const READERS: &[Role] = &[Viewer, Editor, Admin, Core];
const WRITERS: &[Role] = &[Editor, Admin];
const ADMINS: &[Role] = &[Admin];
const ALL: &[Role] = &[Anonymous, Agent, Service, Viewer, Editor, Admin, Core];

/// Who may call an RPC, and whether the audit has its calls. Refusals it has of all.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// `/<package.Service>/<Method>`.
    pub rpc: &'static str,
    /// Who may.
    pub roles: &'static [Role],
    /// It changes something, is rare, and a person or an identity is at stake. The data of services are in the log of the
    /// store with the identity that wrote them.
    pub audited: bool,
}

const fn rule(rpc: &'static str, roles: &'static [Role]) -> Rule {
    Rule { rpc, roles, audited: false }
}

const fn audited(rpc: &'static str, roles: &'static [Role]) -> Rule {
    Rule { rpc, roles, audited: true }
}

/// All rules, by RPC.
pub const RULES: &[Rule] = &[
    audited("/cnsmo.admin.v1.AdminService/Backup", ADMINS),
    audited("/cnsmo.admin.v1.AdminService/Compact", ADMINS),
    rule("/cnsmo.admin.v1.AdminService/GetStatus", READERS),
    rule("/cnsmo.agent.v1.AgentService/Connect", &[Agent]),
    audited("/cnsmo.bus.v1.BusService/DeleteGroup", WRITERS),
    rule("/cnsmo.bus.v1.BusService/ListMessages", READERS),
    rule("/cnsmo.bus.v1.BusService/ListStreams", READERS),
    rule("/cnsmo.bus.v1.BusService/Publish", USERS),
    rule("/cnsmo.bus.v1.BusService/PublishBatch", USERS),
    audited("/cnsmo.bus.v1.BusService/Replay", WRITERS),
    rule("/cnsmo.bus.v1.BusService/Request", USERS),
    rule("/cnsmo.bus.v1.BusService/Subscribe", USERS),
    rule("/cnsmo.catalog.v1.CatalogService/Announce", USERS),
    rule("/cnsmo.catalog.v1.CatalogService/GetInstance", KNOWN),
    rule("/cnsmo.catalog.v1.CatalogService/ListInstances", KNOWN),
    rule("/cnsmo.catalog.v1.CatalogService/WatchInstances", KNOWN),
    rule("/cnsmo.catalog.v1.CatalogService/Withdraw", USERS),
    rule("/cnsmo.event.v1.EventService/WatchEvents", READERS),
    rule("/cnsmo.flow.v1.FlowService/Explain", READERS),
    rule("/cnsmo.flow.v1.FlowService/ListFlows", READERS),
    rule("/cnsmo.flow.v1.FlowService/ReadRecords", READERS),
    audited("/cnsmo.identity.v1.EnrollmentService/Enroll", &[Anonymous]),
    rule("/cnsmo.identity.v1.IdentityService/ListAudit", ADMINS),
    rule("/cnsmo.identity.v1.IdentityService/ListIdentities", READERS),
    audited("/cnsmo.identity.v1.IdentityService/Renew", KNOWN),
    audited("/cnsmo.identity.v1.IdentityService/RevokeIdentity", ADMINS),
    audited("/cnsmo.identity.v1.JoinTokenService/CreateJoinToken", ADMINS),
    audited("/cnsmo.identity.v1.JoinTokenService/DeleteJoinToken", ADMINS),
    rule("/cnsmo.identity.v1.JoinTokenService/ListJoinTokens", ADMINS),
    audited("/cnsmo.resource.v1.ResourceService/Apply", WRITERS),
    audited("/cnsmo.resource.v1.ResourceService/Delete", WRITERS),
    rule("/cnsmo.resource.v1.ResourceService/Get", READERS),
    rule("/cnsmo.resource.v1.ResourceService/List", READERS),
    rule("/cnsmo.resource.v1.ResourceService/ListHistory", READERS),
    audited("/cnsmo.resource.v1.ResourceService/Rollback", WRITERS),
    audited("/cnsmo.resource.v1.ResourceService/Scale", WRITERS),
    rule("/cnsmo.resource.v1.ResourceService/WaitApplied", READERS),
    rule("/cnsmo.resource.v1.ResourceService/Watch", READERS),
    rule("/cnsmo.service.v1.HostService/GetFeatures", READERS),
    rule("/cnsmo.service.v1.HostService/GetStatus", READERS),
    audited("/cnsmo.service.v1.HostService/Kill", ADMINS),
    rule("/cnsmo.service.v1.HostService/ListServices", READERS),
    rule("/cnsmo.service.v1.HostService/ReadLogs", READERS),
    audited("/cnsmo.service.v1.HostService/Restart", WRITERS),
    audited("/cnsmo.service.v1.HostService/Start", WRITERS),
    audited("/cnsmo.service.v1.HostService/Stop", WRITERS),
    rule("/cnsmo.state.v1.StateService/Get", KNOWN),
    rule("/cnsmo.state.v1.StateService/GrantLease", USERS),
    rule("/cnsmo.state.v1.StateService/KeepAliveLease", USERS),
    rule("/cnsmo.state.v1.StateService/List", KNOWN),
    rule("/cnsmo.state.v1.StateService/RevokeLease", USERS),
    rule("/cnsmo.state.v1.StateService/Txn", USERS),
    rule("/cnsmo.state.v1.StateService/Watch", KNOWN),
    rule("/grpc.health.v1.Health/Check", ALL),
    rule("/grpc.health.v1.Health/Watch", ALL),
    rule("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", READERS),
];

/// The rule of an RPC.
pub fn rule_of(path: &str) -> Option<&'static Rule> {
    let at = RULES.binary_search_by(|rule| rule.rpc.cmp(path)).ok()?;
    RULES.get(at)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    /// Fails when an RPC is added without a rule, or a rule outlives its RPC.
    #[test]
    fn every_rpc_has_exactly_one_rule() {
        let sets = [
            cnsmo_proto::DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        ];
        let mut rpcs = BTreeSet::new();
        for set in sets {
            for file in FileDescriptorSet::decode(set).unwrap().file {
                for service in &file.service {
                    for method in &service.method {
                        rpcs.insert(format!(
                            "/{}.{}/{}",
                            file.package(),
                            service.name(),
                            method.name()
                        ));
                    }
                }
            }
        }
        let rules: Vec<_> = RULES.iter().map(|rule| rule.rpc.to_owned()).collect();
        assert!(rules.is_sorted_by(|a, b| a < b), "they are found by binary search");
        assert_eq!(rules.into_iter().collect::<BTreeSet<_>>(), rpcs);
    }

    /// The whole of what each role may, as in docs/identity.md.
    #[test]
    fn each_role_may_what_it_should_and_no_more() {
        assert!(rule_of("/cnsmo.resource.v1.ResourceService/Unknown").is_none());
        assert!(rule_of("").is_none());
        let may = |role, word: &str| {
            RULES
                .iter()
                .filter(|rule| rule.rpc.contains(word))
                .all(|rule| rule.roles.contains(&role))
        };
        let none = |role, word: &str| {
            RULES
                .iter()
                .filter(|rule| rule.rpc.contains(word))
                .all(|rule| !rule.roles.contains(&role))
        };
        for role in [Agent, Service, Viewer, Editor, Core] {
            for word in ["Token", "Revoke", "Audit", "Backup", "Compact"] {
                let word = if word == "Revoke" { "RevokeIdentity" } else { word };
                assert!(none(role, word), "{role:?} {word}");
            }
        }
        for role in [Agent, Service, Viewer, Core] {
            assert!(none(role, "/Apply") && none(role, "ResourceService/Delete"), "{role:?}");
        }
        for word in ["Txn", "Lease", "Publish", "Subscribe", "Bus", "Announce", "Withdraw"] {
            let word = if word == "Bus" { "BusService/Request" } else { word };
            assert!(none(Viewer, word), "{word}");
        }
        for word in ["Resource", "State", "Bus", "Catalog", "Admin", "Token"] {
            assert!(may(Admin, word) && none(Anonymous, word), "{word}");
        }
        assert!(none(Agent, "Resource") && none(Service, "Resource") && none(Admin, "Agent"));
        let anonymous: Vec<_> =
            RULES.iter().filter(|rule| rule.roles.contains(&Anonymous)).map(|r| r.rpc).collect();
        assert_eq!(anonymous.len(), 3, "{anonymous:?}");
        // Whatever persons change is in the audit.
        for rule in RULES.iter().filter(|rule| rule.roles == WRITERS) {
            assert!(rule.audited, "{}", rule.rpc);
        }
    }
}
