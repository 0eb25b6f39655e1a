//! Datapaths that tests take turns with: to load the programs takes the verifier far longer than a test
//! takes, seconds on a machine that is translated.
//!
//! ```text
//! test thread ── job ──> worker thread, in namespaces of its own, with one datapath ── result ──> test thread
//! ```
//! After each test the tables are emptied. A worker whose test fails is not used again.

use std::{
    any::Any,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use crate::{
    lab::{Lab, Net},
    support::World,
};

/// A file system to put the worker's own over, in its own mount namespace.
const BPFFS: &str = "/sys/fs/bpf";

type Test = Box<dyn FnOnce(&mut Lab) + Send>;
type Outcome = Result<(), Box<dyn Any + Send>>;

/// A thread that runs tests.
struct Worker {
    jobs: Sender<(Net, Test)>,
    outcomes: Receiver<Outcome>,
}

/// Those that have nothing to do.
static IDLE: Mutex<Vec<Worker>> = Mutex::new(Vec::new());

/// Runs a test on a configured lab.
pub(crate) fn run(net: Net, test: impl FnOnce(&mut Lab) + Send + 'static) {
    let idle = || IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    // Not in one expression: the lock would be held while a worker is made.
    let worker = idle().pop();
    let worker = worker.unwrap_or_else(Worker::start);
    worker.jobs.send((net, Box::new(test))).expect("a worker");
    match worker.outcomes.recv().expect("a worker's outcome") {
        Ok(()) => idle().push(worker),
        Err(panic) => panic::resume_unwind(panic),
    }
}

impl Worker {
    fn start() -> Self {
        let (jobs, queue) = channel::<(Net, Test)>();
        let (done, outcomes) = channel();
        thread::spawn(move || {
            let world = World::at(Path::new(BPFFS));
            let mut lab = Lab::bare(&world, Net::V4);
            for (net, test) in queue {
                let outcome = panic::catch_unwind(AssertUnwindSafe(|| {
                    lab.of(net);
                    lab.configure();
                    test(&mut lab);
                    lab.datapath.clear().expect("empty tables");
                }));
                if done.send(outcome).is_err() {
                    return;
                }
            }
        });
        Self { jobs, outcomes }
    }
}
