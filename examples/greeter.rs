//! A service of somebody else: it answers requests, is in the catalogue, and finishes what it has when it is asked to stop.
//!
//!     cargo run -p cnsmo-service --example greeter -- /run/cnsmo/core.sock greeter-1

use std::{env, error::Error, path::PathBuf, sync::Arc, time::Duration};

use cnsmo_proto::pb::bus::{Delivery, Subscription};
use cnsmo_service::{
    announce::Announcement,
    bus::{Answer, Bus},
    channel,
    host::{Host, Run, Service},
    lifecycle::{Lifecycle, Phase},
    supervise::{Limits, Stop, stop_pair},
};
use tokio::signal::unix::{SignalKind, signal};

struct Greeter(Bus);

impl Service for Greeter {
    fn name(&self) -> &str {
        "greeter"
    }

    fn run(&self, life: Lifecycle, stop: Stop) -> Run {
        let bus = self.0.clone();
        Box::pin(async move {
            life.step(Phase::Ready, "Healthy", "")?;
            let subject = "svc.greeter".to_owned();
            let queue_group = "greeter".to_owned();
            let subscription = Subscription { subject, queue_group, ..Subscription::default() };
            let greet = |delivery: Delivery| async move {
                let who = delivery.message.unwrap_or_default().payload;
                let payload = format!("hello, {}", String::from_utf8_lossy(&who)).into();
                Ok(Answer { payload, ..Answer::default() })
            };
            Ok(bus.serve(subscription, 16, stop, greet).await?)
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let (Some(socket), Some(name)) = (arguments.next(), arguments.next()) else {
        return Err("usage: greeter SOCKET NAME".into());
    };
    let channel = channel::local(&PathBuf::from(socket))?;
    let host = Host::new(Limits::DEFAULT);
    host.add(Arc::new(Greeter(Bus::new(channel.clone()))))?;
    let ttl = Duration::from_secs(3);
    let announcement =
        Announcement { service: "greeter".into(), name, ttl, ..Announcement::default() };
    let (stopper, stop) = stop_pair();
    let announcing = tokio::spawn(host.clone().announce(channel, announcement, stop));
    signal(SignalKind::terminate())?.recv().await;
    host.stop("greeter", None).await?;
    stopper.stop();
    announcing.await??;
    Ok(())
}
