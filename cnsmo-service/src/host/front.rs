//! Orders to services as they come over the wire: by `HostService`, and by the core's commands to an agent.

use std::{collections::VecDeque, future::Future, pin::Pin, sync::Arc, time::Duration};

use cnsmo_proto::pb::{
    agent::{CommandResult, command::Command, command_result::Result as Outcome},
    catalog,
    service::{
        GetFeaturesRequest, GetFeaturesResponse, GetStatusRequest, GetStatusResponse, KillRequest,
        KillResponse, ListServicesRequest, ListServicesResponse, LogLine, ReadLogsRequest,
        ReadLogsResponse, RestartRequest, RestartResponse, ServiceId, ServiceStatus, StartRequest,
        StartResponse, StopRequest, StopResponse, host_service_server::HostService,
    },
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::{About, Host, OrderError};
use crate::{
    lifecycle::{Phase, State},
    supervise::Chain,
};

/// Longest time that a service may be given to finish what it has.
pub const DEADLINE_MAX: Duration = Duration::from_secs(3_600);

/// What is told of a service's output in one message.
const LOG_BYTES_MAX: usize = 256 << 10;

/// Lines of output as they come.
pub type LogStream = Pin<Box<dyn Stream<Item = Result<ReadLogsResponse, Status>> + Send>>;

/// Who carries out what is asked of services.
pub trait Steer: Send + Sync + 'static {
    /// Carries out a command, or has it carried out.
    fn steer(&self, command: Command) -> impl Future<Output = Result<Outcome, Status>> + Send;

    /// What a service writes.
    ///
    /// # Errors
    /// There is none of that name, or it has no output of its own.
    fn logs(&self, request: ReadLogsRequest) -> Result<LogStream, Status>;
}

/// The services of this program.
#[derive(Clone, Debug)]
pub struct Local {
    host: Host,
    node: Arc<str>,
}

impl Local {
    /// `node`: as which this host is known; empty if that is not known yet.
    pub fn new(host: Host, node: &str) -> Self {
        Self { host, node: node.into() }
    }

    /// Carries out a command of the core, whose answer this is. Followers are for [`super::follow::Followers`].
    pub async fn answer(&self, id: u64, command: Command) -> CommandResult {
        result(id, self.steer(command).await)
    }

    /// All services, by name.
    pub fn list(&self) -> Vec<ServiceStatus> {
        self.host.list().into_iter().map(|status| self.status(status)).collect()
    }

    fn status(&self, status: super::Status) -> ServiceStatus {
        let super::Status { about, pid, state, restarts } = status;
        let State { phase, reason, message, since } = state;
        let About { service, instance, driver, .. } = about;
        ServiceStatus {
            id: Some(ServiceId { node: self.node.to_string(), service, instance }),
            phase: catalog::Phase::from(phase).into(),
            reason: reason.into(),
            message,
            phase_time: Some(since.into()),
            pid,
            restarts,
            driver: driver.into(),
        }
    }

    fn check_node(&self, field: &str, node: &str) -> Result<(), Status> {
        if node.is_empty() || node == &*self.node {
            return Ok(());
        }
        let ours = &self.node;
        Err(Status::invalid_argument(format!("{field}: this host is `{ours}`, not `{node}`")))
    }

    fn service(&self, id: Option<ServiceId>) -> Result<String, Status> {
        let ServiceId { node, service, instance } = id.unwrap_or_default();
        self.check_node("id.node", &node)?;
        if service.is_empty() {
            return Err(Status::invalid_argument("id.service: missing"));
        }
        Ok(self.host.name_of(&service, &instance)?)
    }
}

impl Steer for Local {
    async fn steer(&self, command: Command) -> Result<Outcome, Status> {
        let host = &self.host;
        let status = match command {
            Command::List(ListServicesRequest { node }) => {
                self.check_node("node", &node)?;
                return Ok(Outcome::Services(ListServicesResponse { services: self.list() }));
            }
            Command::Features(request) => {
                let features = host.features(&self.service(request.id)?)?;
                return Ok(Outcome::Features(GetFeaturesResponse { features }));
            }
            Command::Status(request) => host.status(&self.service(request.id)?)?,
            Command::Logs(request) => {
                let logs = self.logs(ReadLogsRequest { follow: false, ..request })?;
                return Ok(Outcome::Logs(ReadLogsResponse { lines: end_of(logs).await?.into() }));
            }
            Command::Follow(_) => {
                return Err(Status::unimplemented("followers are of a core's stream alone"));
            }
            Command::Records(_) | Command::Explain(_) | Command::Flows(_) | Command::Preview(_) => {
                return Err(Status::unimplemented("this host has no packets to tell of"));
            }
            Command::Start(request) => {
                let service = self.service(request.id)?;
                tracing::info!(service, "asked to start");
                host.start(&service).await?
            }
            Command::Stop(StopRequest { id, deadline }) => {
                let (service, deadline) = (self.service(id)?, time(deadline)?);
                tracing::info!(service, ?deadline, "asked to stop");
                host.stop(&service, deadline).await?
            }
            Command::Restart(RestartRequest { id, deadline }) => {
                let (service, deadline) = (self.service(id)?, time(deadline)?);
                tracing::info!(service, ?deadline, "asked to restart");
                host.restart(&service, deadline).await?
            }
            Command::Kill(request) => {
                let service = self.service(request.id)?;
                tracing::warn!(service, "asked to be killed");
                host.kill(&service).await?
            }
        };
        Ok(Outcome::Status(self.status(status)))
    }

    fn logs(&self, request: ReadLogsRequest) -> Result<LogStream, Status> {
        let ReadLogsRequest { id, tail, follow } = request;
        let logs = self.host.logs(&self.service(id)?, tail as usize, follow)?;
        logs.ok_or_else(|| {
            let text = "it has no output of its own: see the log of the program that it is part of";
            Status::failed_precondition(text)
        })
    }
}

/// As it goes to the core.
pub(super) fn result(id: u64, outcome: Result<Outcome, Status>) -> CommandResult {
    match outcome {
        Ok(result) => CommandResult { id, result: Some(result), ..CommandResult::default() },
        Err(status) => {
            let (code, message) = (i32::from(status.code()), status.message().to_owned());
            CommandResult { id, code: code.unsigned_abs(), message, result: None }
        }
    }
}

/// Of one in a message, about.
pub(super) fn size(line: &LogLine) -> usize {
    line.text.len() + 32
}

/// As many of the last lines as fit into one message.
async fn end_of(mut logs: LogStream) -> Result<VecDeque<LogLine>, Status> {
    let (mut lines, mut bytes) = (VecDeque::new(), 0);
    while let Some(some) = logs.next().await {
        for line in some?.lines {
            bytes += size(&line);
            lines.push_back(line);
        }
        while bytes > LOG_BYTES_MAX
            && let Some(oldest) = lines.pop_front()
        {
            bytes -= size(&oldest);
        }
    }
    Ok(lines)
}

/// How long a service may take to stop. None: as its host says.
///
/// # Errors
/// It is negative, or longer than [`DEADLINE_MAX`].
pub fn time(deadline: Option<prost_types::Duration>) -> Result<Option<Duration>, Status> {
    let Some(asked) = deadline else { return Ok(None) };
    match Duration::try_from(asked) {
        Ok(deadline) if deadline <= DEADLINE_MAX => Ok(Some(deadline)),
        _ => {
            let text = format!("deadline: is not within 0 to {} s", DEADLINE_MAX.as_secs());
            Err(Status::invalid_argument(text))
        }
    }
}

impl From<OrderError> for Status {
    fn from(error: OrderError) -> Self {
        let text = Chain(&error).to_string();
        match error {
            OrderError::Unknown(_) => Self::not_found(text),
            OrderError::Several { .. } => Self::invalid_argument(text),
            OrderError::Taken(_) => Self::already_exists(text),
            OrderError::Illegal { .. } => Self::failed_precondition(text),
            OrderError::Busy(_) => Self::resource_exhausted(text),
        }
    }
}

impl From<Phase> for catalog::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Installing => Self::Installing,
            Phase::Starting => Self::Starting,
            Phase::Ready => Self::Ready,
            Phase::Degraded => Self::Degraded,
            Phase::Draining => Self::Draining,
            Phase::Stopped => Self::Stopped,
            Phase::Failed => Self::Failed,
        }
    }
}

/// `HostService` over whoever carries its calls out.
#[derive(Clone, Debug)]
pub struct Front<S>(pub S);

impl<S: Steer> Front<S> {
    async fn status(&self, command: Command) -> Result<Option<ServiceStatus>, Status> {
        match self.0.steer(command).await? {
            Outcome::Status(status) => Ok(Some(status)),
            _ => Err(other_answer()),
        }
    }
}

fn other_answer() -> Status {
    Status::internal("the host answers something else than it was asked")
}

#[tonic::async_trait]
impl<S: Steer> HostService for Front<S> {
    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        match self.0.steer(Command::List(request.into_inner())).await? {
            Outcome::Services(services) => Ok(Response::new(services)),
            _ => Err(other_answer()),
        }
    }

    async fn get_status(
        &self,
        request: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        let status = self.status(Command::Status(request.into_inner())).await?;
        Ok(Response::new(GetStatusResponse { status }))
    }

    async fn get_features(
        &self,
        request: Request<GetFeaturesRequest>,
    ) -> Result<Response<GetFeaturesResponse>, Status> {
        match self.0.steer(Command::Features(request.into_inner())).await? {
            Outcome::Features(features) => Ok(Response::new(features)),
            _ => Err(other_answer()),
        }
    }

    async fn start(
        &self,
        request: Request<StartRequest>,
    ) -> Result<Response<StartResponse>, Status> {
        let status = self.status(Command::Start(request.into_inner())).await?;
        Ok(Response::new(StartResponse { status }))
    }

    async fn stop(&self, request: Request<StopRequest>) -> Result<Response<StopResponse>, Status> {
        let status = self.status(Command::Stop(request.into_inner())).await?;
        Ok(Response::new(StopResponse { status }))
    }

    async fn restart(
        &self,
        request: Request<RestartRequest>,
    ) -> Result<Response<RestartResponse>, Status> {
        let status = self.status(Command::Restart(request.into_inner())).await?;
        Ok(Response::new(RestartResponse { status }))
    }

    async fn kill(&self, request: Request<KillRequest>) -> Result<Response<KillResponse>, Status> {
        let status = self.status(Command::Kill(request.into_inner())).await?;
        Ok(Response::new(KillResponse { status }))
    }

    type ReadLogsStream = LogStream;

    async fn read_logs(
        &self,
        request: Request<ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        self.0.logs(request.into_inner()).map(Response::new)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::{
        host::{Run, Service},
        lifecycle::Lifecycle,
        supervise::{Limits, Stop},
    };

    struct Idle;

    impl Service for Idle {
        fn name(&self) -> &str {
            "idle"
        }

        fn features(&self) -> Vec<String> {
            vec!["nothing".into()]
        }

        fn run(&self, life: Lifecycle, mut stop: Stop) -> Run {
            Box::pin(async move {
                life.step(Phase::Ready, "Healthy", "")?;
                stop.asked().await;
                Ok(())
            })
        }
    }

    fn id(node: &str, service: &str) -> Option<ServiceId> {
        Some(ServiceId { node: node.into(), service: service.into(), instance: String::new() })
    }

    #[tokio::test(start_paused = true)]
    async fn calls_are_carried_out_and_what_is_wrong_is_named() {
        let second = Duration::from_secs(1);
        let host = Host::new(Limits {
            first_delay: second,
            longest_delay: second,
            restarts_max: 1,
            window: second,
            stop_deadline: second,
        });
        let life = host.add(Arc::new(Idle)).unwrap();
        life.watch().wait_for(|state| state.phase == Phase::Ready).await.unwrap();
        let front = Front(Local::new(host, "vm1"));

        let all = front.list_services(Request::new(ListServicesRequest::default())).await.unwrap();
        let [status] = &*all.into_inner().services else { panic!("one service") };
        assert_eq!(status.id, id("vm1", "idle"));
        assert_eq!((status.phase(), status.pid), (catalog::Phase::Ready, std::process::id()));
        let features = GetFeaturesRequest { id: id("", "idle") };
        let features = front.get_features(Request::new(features)).await.unwrap().into_inner();
        assert_eq!(features.features, ["nothing"]);

        let stop = |id, seconds| {
            let deadline = Some(prost_types::Duration { seconds, nanos: 0 });
            front.stop(Request::new(StopRequest { id, deadline }))
        };
        let cases = [
            (stop(None, 1).await, Code::InvalidArgument, "id.service: missing"),
            (stop(id("", "other"), 1).await, Code::NotFound, "there is no service other"),
            (
                stop(id("vm2", "idle"), 1).await,
                Code::InvalidArgument,
                "id.node: this host is `vm1`",
            ),
            (stop(id("", "idle"), 3_601).await, Code::InvalidArgument, "deadline: "),
            (stop(id("", "idle"), -1).await, Code::InvalidArgument, "deadline: "),
        ];
        for (answer, code, text) in cases {
            let status = answer.unwrap_err();
            assert_eq!(status.code(), code, "{status}");
            assert!(status.message().starts_with(text), "{status}");
        }
        stop(id("vm1", "idle"), 5).await.unwrap();
        let refused = stop(id("vm1", "idle"), 5).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        let text = "service idle: a service cannot go from stopped to draining";
        assert_eq!(refused.message(), text);
    }
}
