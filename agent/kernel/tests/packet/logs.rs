//! The programs' log records reach `tracing`, at the level that was asked for.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
    time::Duration,
};

use hachi_kernel::{Datapath, LoadOptions};
use tracing::Level;

use crate::{
    lab::{Lab, Net, PORT, syn},
    support::{isolated, require_datapath},
};

/// What `tracing` was given.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .expect("no writer has panicked")
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Forwards for a moment what the programs log of one packet that is dropped and one that is not.
fn records(level: Level) -> String {
    let lines = Lines::default();
    let writer = lines.clone();
    isolated(move |world| {
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let options = LoadOptions {
            log_level: Some(level),
            ..world.options()
        };
        let datapath = Datapath::load(&options).expect("the datapath loads");
        let mut lab = Lab::with(world, Net::V4, datapath);
        lab.configure();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let forwarder = lab
                .datapath
                .logs()
                .expect("a forwarder")
                .expect("a level is set");
            let packet = lab.packet(lab.client, lab.server.ip, syn(PORT)).bytes();
            lab.send(lab.client, &packet);
            lab.send(lab.other, &packet);
            let forwarding = tokio::time::timeout(Duration::from_millis(300), forwarder.run());
            forwarding
                .await
                .expect_err("it forwards for as long as it is let");
        });
    });
    let bytes = lines.0.lock().expect("no writer has panicked").clone();
    String::from_utf8(bytes).expect("text")
}

#[test]
fn records_of_the_level_are_forwarded() {
    require_datapath!();
    let info = records(Level::INFO);
    assert!(info.contains("drop spoofed_source"), "{info}");
    assert!(!info.contains("deliver from"), "{info}");
    let trace = records(Level::TRACE);
    assert!(trace.contains("drop spoofed_source"), "{trace}");
    assert!(trace.contains("deliver from"), "{trace}");
}

#[test]
fn without_a_level_there_is_nothing_to_forward() {
    require_datapath!();
    isolated(|world| {
        assert!(world.load().logs().expect("no error").is_none());
    });
}
