//! The demonstration: a cluster of its own, a denial, an exception, and how fast both took effect.

use std::{
    io::IsTerminal as _,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::ExitCode,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use hachi_apiserver::{Since, resource};

use crate::{
    cluster::{Cluster, eventually},
    matrix::{Column, Matrix},
    options::{Family, Options},
    workload::{
        probe::{Protocol, Target},
        pulse::{self, Beat, Pulse},
    },
};

const WEB: &str = include_str!("../../../manifests/examples/web.yaml");
const CLIENT: &str = include_str!("../../../manifests/examples/client.yaml");
const DENY_ALL: &str = include_str!("../../../manifests/examples/deny-all.yaml");
const ALLOW_CLIENT: &str = include_str!("../../../manifests/examples/allow-client.yaml");

/// The Pods of the examples.
const WEBS: [&str; 3] = ["default/web-1", "default/web-2", "default/web-3"];
const ASKERS: [&str; 2] = ["default/client", "default/visitor"];

/// An answer inside one machine takes well under a millisecond; a busy machine may need longer.
const TIMEOUT: Duration = Duration::from_millis(400);

/// How long a change may take to show.
const LIMIT: Duration = Duration::from_secs(10);

/// How long the pulse goes on after the matrix has changed.
const AFTER: Duration = Duration::from_millis(150);

/// What a step measured.
type Latency = fn(&[Beat], Instant) -> Option<Duration>;

/// Runs it; fails if anything did not happen that was announced.
pub fn run(dir: &Path, dist: &Path) -> Result<ExitCode> {
    let clock = Instant::now();
    let show = |step: &str| println!("{:>5.1} s  {step}", clock.elapsed().as_secs_f32());
    let options = Options::new(dir.join("demo"), dist, Family::Dual);
    let cluster = Cluster::start_with(options, &mut |step| show(step))?;
    show("two nodes are ready; kubectl apply -f web.yaml -f client.yaml");
    cluster.apply(WEB)?;
    cluster.apply(CLIENT)?;
    cluster.wait_ready("default")?;
    let demo = Demo {
        colours: std::io::stdout().is_terminal(),
        cluster,
    };
    for pod in WEBS.iter().chain(&ASKERS) {
        let running = demo.cluster.pod(pod)?;
        let addresses: Vec<_> = running.addresses.iter().map(ToString::to_string).collect();
        println!(
            "           {pod:<16} on {}  {}",
            running.node,
            addresses.join(" ")
        );
    }
    println!("\nBefore any policy, who reaches whom:");
    demo.expect(|_, _| true)?;

    println!("\nkubectl apply -f manifests/examples/deny-all.yaml");
    let took = demo.step(DENY_ALL, pulse::closed_after, |_, _| false)?;
    println!(
        "  the first packet obeyed {} after the API event",
        milliseconds(took)
    );

    println!("\nkubectl apply -f manifests/examples/allow-client.yaml");
    let took = demo.step(ALLOW_CLIENT, pulse::opened_after, |row, _| {
        row == "default/client"
    })?;
    println!(
        "  the first packet obeyed {} after the API event",
        milliseconds(took)
    );

    demo.cluster.stop()?;
    println!(
        "\nDone in {:.1} s, and nothing is left of it. Try next:\n  \
         cargo xtask up                      a cluster that stays\n  \
         export KUBECONFIG={}/kubeconfig\n  \
         kubectl apply -f manifests/examples/web.yaml -f manifests/examples/client.yaml\n  \
         cargo xtask exec default/client -- hachi-pod probe http ADDRESS:80\n  \
         cargo xtask down",
        clock.elapsed().as_secs_f32(),
        dir.display()
    );
    Ok(ExitCode::SUCCESS)
}

struct Demo {
    colours: bool,
    cluster: Cluster,
}

impl Demo {
    /// Applies a policy while a pulse runs from the client to every `web` Pod; waits for the matrix
    /// to be as expected, shows it, and returns how long the slowest Pod took.
    fn step(
        &self,
        manifest: &str,
        latency: Latency,
        expected: impl Fn(&str, &str) -> bool,
    ) -> Result<Duration> {
        let client = self.cluster.pod("default/client")?;
        let pulses = WEBS
            .iter()
            .map(|web| Pulse::start(&client.netns, self.address(web)?))
            .collect::<Result<Vec<_>>>()?;
        let event = self.next_policy_event()?;
        self.cluster.apply(manifest)?;
        let answered = Instant::now();
        let event = match event {
            Some(event) => event
                .recv_timeout(LIMIT)
                .context("the API has no event for the policy")?,
            None => answered,
        };
        self.expect(expected)?;
        thread::sleep(AFTER);
        let mut slowest = Duration::ZERO;
        for (web, pulse) in WEBS.iter().zip(pulses) {
            let took = latency(&pulse.stop()?, event);
            let took = took.with_context(|| format!("the flow to {web} did not change"))?;
            slowest = slowest.max(took);
        }
        Ok(slowest)
    }

    fn address(&self, pod: &str) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.cluster.pod_ip(pod)?, 80))
    }

    /// Shows the matrix as soon as it is as expected.
    fn expect(&self, expected: impl Fn(&str, &str) -> bool) -> Result<()> {
        let rows: Vec<String> = ASKERS
            .iter()
            .chain(&WEBS)
            .map(|row| (*row).to_owned())
            .collect();
        let columns = self.columns()?;
        let mut shown = String::new();
        eventually(LIMIT, || {
            let matrix = Matrix::measure(&self.cluster, &rows, &columns, TIMEOUT)?;
            shown = matrix.render(self.colours);
            match matrix.differences(&expected) {
                differences if differences.is_empty() => Ok(()),
                differences => bail!("{shown}not as it should be: {}", differences.join(", ")),
            }
        })?;
        print!("{shown}");
        Ok(())
    }

    fn columns(&self) -> Result<Vec<Column>> {
        let tcp = |ip: IpAddr| Target::new(Protocol::Tcp, ip, 80);
        let mut columns = Vec::new();
        for web in WEBS {
            columns.push(Column {
                label: web.trim_start_matches("default/").to_owned(),
                target: tcp(self.cluster.pod_ip(web)?),
                // A Pod always reaches itself; that is no news.
                skip: vec![web.to_owned()],
            });
        }
        columns.push(Column {
            label: "Service web".into(),
            target: tcp(self.cluster.service_ip("default", "web")?),
            // Its own backends may be answered by themselves.
            skip: WEBS.map(str::to_owned).to_vec(),
        });
        Ok(columns)
    }

    /// The moment of the next change of a policy in the API. The double is asked directly; the real
    /// API tells it by its answer to kubectl, which comes a little later.
    fn next_policy_event(&self) -> Result<Option<mpsc::Receiver<Instant>>> {
        let (sender, receiver) = mpsc::channel();
        let Some(store) = self.cluster.store() else {
            return Ok(None);
        };
        let mut watch = store.watch(resource::NETWORK_POLICIES, Since::Now)?;
        let deadline = Instant::now() + LIMIT;
        thread::spawn(move || {
            while Instant::now() < deadline {
                match watch.ready() {
                    Ok(Some(_)) => {
                        // Whoever asked may have given up.
                        let _ = sender.send(Instant::now());
                        return;
                    }
                    Ok(None) => thread::sleep(Duration::from_micros(100)),
                    Err(_) => return,
                }
            }
        });
        Ok(Some(receiver))
    }
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}
