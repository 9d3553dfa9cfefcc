//! How an instance is started: names are numbers, variables have values.

use std::{collections::BTreeMap, path::PathBuf};

use cnsmo_proto::model::{Check, Instance, Limits, port_variable};
use nix::unistd::{Gid, Group, Uid, User};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is executed, as whom and where.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    /// Program and arguments; empty: a unit that is there.
    pub(super) command: Vec<String>,
    /// All of it.
    pub(super) environment: BTreeMap<String, String>,
    /// Of the command of an exec probe.
    pub(super) check: Vec<String>,
    /// None: the agent's.
    pub(super) user: Option<Uid>,
    /// None: the agent's.
    pub(super) group: Option<Gid>,
    /// None: a folder of the instance's own.
    pub(super) directory: Option<PathBuf>,
    /// Of the group of processes.
    pub(super) limits: Limits,
}

impl Launch {
    /// Looks names up on this VM.
    pub(super) fn new(instance: &Instance) -> Result<Self, String> {
        let mut variables = BTreeMap::from([
            ("INSTANCE".to_owned(), instance.name.to_string()),
            ("DEPLOYMENT".to_owned(), instance.deployment.to_string()),
            ("NODE".to_owned(), instance.node.to_string()),
        ]);
        let ports = instance.template.ports.iter();
        variables.extend(ports.map(|port| (port_variable(&port.name), port.port.to_string())));
        let driver = &instance.template.driver;
        let all = |texts: &[String]| texts.iter().map(|text| expand(text, &variables)).collect();
        let check = match driver.readiness().map(|probe| &probe.check) {
            Some(Check::Exec(command)) => all(command),
            Some(Check::Tcp(_) | Check::Http { .. } | Check::Announced) | None => Vec::new(),
        };
        let process = driver.process();
        let command = process.map_or_else(Vec::new, |process| all(&process.command));
        let given = process.iter().flat_map(|process| &process.environment);
        let given: Vec<_> =
            given.map(|(key, text)| (key.clone(), expand(text, &variables))).collect();
        let mut environment = variables;
        environment.insert("PATH".to_owned(), PATH.to_owned());
        environment.extend(given);
        let (user, group) = process
            .map_or((None, None), |process| (process.user.as_deref(), process.group.as_deref()));
        let (user, group) = account(user, group)?;
        let directory = process.and_then(|process| process.directory.as_ref().map(PathBuf::from));
        let limits = process.map(|process| process.limits).unwrap_or_default();
        Ok(Self { command, environment, check, user, group, directory, limits })
    }
}

fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut expanded = text.to_owned();
    for (name, value) in variables {
        expanded = expanded.replace(&format!("${{{name}}}"), value);
    }
    expanded
}

fn account(user: Option<&str>, group: Option<&str>) -> Result<(Option<Uid>, Option<Gid>), String> {
    let group = group.map(group_id).transpose()?;
    let Some(user) = user else { return Ok((None, group)) };
    let number = user.parse().map(Uid::from_raw);
    let known = match number {
        Ok(uid) => User::from_uid(uid),
        Err(_) => User::from_name(user),
    };
    let known = known.map_err(|error| format!("user {user}: {error}"))?;
    let uid = match (&known, number) {
        (Some(known), _) => known.uid,
        (None, Ok(uid)) => uid,
        (None, Err(_)) => return Err(format!("user {user}: this VM does not know it")),
    };
    match group.or(known.map(|known| known.gid)) {
        Some(group) => Ok((Some(uid), Some(group))),
        None => Err(format!("user {user}: this VM does not know it, so its group must be named")),
    }
}

fn group_id(group: &str) -> Result<Gid, String> {
    if let Ok(number) = group.parse() {
        return Ok(Gid::from_raw(number));
    }
    let known = Group::from_name(group).map_err(|error| format!("group {group}: {error}"))?;
    known.map(|known| known.gid).ok_or_else(|| format!("group {group}: this VM does not know it"))
}
