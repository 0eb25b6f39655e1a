//! Changes of the node's own network, told to the agent's task.

use std::{thread, time::Duration};

use hachi_net::Monitor;
use tokio::sync::mpsc;
use tracing::warn;

/// How long changes are gathered before they are told: they come in crowds.
const GATHER: Duration = Duration::from_millis(100);
/// How often the end of the agent's task is looked for.
const PERIOD: Duration = Duration::from_secs(1);

/// Starts to listen. Where that fails the agent has to look by itself, as it does from time to time.
pub(crate) fn start() -> mpsc::Receiver<()> {
    // News that has not been heard yet stands for what comes after it.
    let (teller, news) = mpsc::channel(1);
    let listen = Monitor::start().map_err(anyhow::Error::from);
    let started = listen.and_then(|monitor| {
        let thread = thread::Builder::new().name("news".into());
        Ok(thread.spawn(move || tell(monitor, &teller)).map(drop)?)
    });
    if let Err(error) = started {
        warn!(%error, "changes of the node's network are found late");
    }
    news
}

fn tell(mut monitor: Monitor, teller: &mpsc::Sender<()>) {
    while !teller.is_closed() {
        match monitor.wait(PERIOD) {
            Ok(false) => {}
            Ok(true) => {
                let _ = teller.try_send(());
                thread::sleep(GATHER);
            }
            Err(error) => {
                warn!(%error, "changes of the node's network are found late from here on");
                return;
            }
        }
    }
}
