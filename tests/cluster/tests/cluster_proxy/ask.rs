//! Questions to Services, from anywhere, and how they have to end.

use std::{
    collections::BTreeSet,
    fmt,
    net::IpAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hachi_cluster::{
    Outcome,
    Protocol::{Http, Sctp, Tcp, Udp},
    Target,
    bed::{Bed, LIMIT},
    workload::{
        ask::{Ask, Way},
        probe::{exchange, probe},
    },
};

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A Pod, `SHORT/NAME`; its packets are translated.
    Pod(&'static str),
    /// A Pod whose sockets are in the node's cgroup: they are given backends.
    Sockets(&'static str),
    /// A process of that node.
    Node(&'static str),
    /// A process of that node whose sockets get no backend; its packets are translated.
    Host(&'static str),
    /// A host that is no node and has no route to any Pod.
    Outside,
}

/// How a question has to end. Pods are `SHORT/NAME`.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// Each of them answers, and nobody else; they see the client under one of the addresses.
    All(BTreeSet<String>, Client),
    /// One of them answers, and always the same.
    One(BTreeSet<String>),
    /// A reset or an ICMP error.
    Reject,
    /// No answer at all.
    Drop,
    /// Somebody outside of the cluster answers.
    Network(&'static str),
}

/// As whom a backend sees the client: by the backend's name.
pub(crate) type Client = fn(&Bed, Source, &str, Target) -> Result<Vec<IpAddr>>;

/// One question.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) what: String,
    pub(crate) source: Source,
    pub(crate) to: Target,
    pub(crate) end: End,
}

/// What one attempt brought.
struct Said {
    outcome: Outcome,
    client: Option<IpAddr>,
    /// Somebody said no, although a process of the node counts it as silence.
    denied: bool,
}

impl Said {
    /// That nothing came; fails with what did.
    fn silence(&self) -> Result<Silence> {
        ensure!(
            self.outcome == Outcome::Silent && !self.denied,
            "{}",
            self.outcome
        );
        Ok(Silence)
    }

    /// That the right answer did not come.
    fn unanswered(&self) -> anyhow::Error {
        self.silence().map_or_else(|error| error, Into::into)
    }
}

/// Nothing came where an answer was due.
#[derive(Debug)]
struct Silence;

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Outcome::Silent.fmt(f)
    }
}

impl std::error::Error for Silence {}

/// Asks so often, from one process or in this one.
fn ask(bed: &Bed, source: Source, to: Target, count: u32, wait: Duration) -> Result<Vec<Said>> {
    let (place, in_cgroup) = match source {
        Source::Pod(pod) => (bed.full(pod), false),
        Source::Sockets(pod) => (bed.full(pod), true),
        Source::Node(node) => (format!("node/{node}"), true),
        Source::Host(node) => (format!("node/{node}"), false),
        Source::Outside => ("outside".to_owned(), false),
    };
    if in_cgroup {
        return by_process(bed, &place, to, count, wait);
    }
    let netns = bed.cluster.netns(&place)?;
    netns.get().enter(|| {
        let once = |_| {
            if to.protocol == Http
                && let Ok(exchange) = exchange(to.address, wait)
            {
                return Said {
                    outcome: Outcome::Answered(exchange.name),
                    client: exchange.client.map(|client| client.ip()),
                    denied: false,
                };
            }
            // How it failed, a plain probe tells.
            let protocol = if to.protocol == Http {
                Tcp
            } else {
                to.protocol
            };
            Said {
                outcome: probe(Target { protocol, ..to }, wait),
                client: None,
                denied: false,
            }
        };
        Ok((0..count).map(once).collect())
    })?
}

fn by_process(bed: &Bed, place: &str, to: Target, count: u32, wait: Duration) -> Result<Vec<Said>> {
    let way = match to.protocol {
        Http => Way::Http,
        Tcp => Way::Tcp,
        Udp => Way::Connected,
        Sctp => bail!("sockets are not balanced for SCTP"),
    };
    let question = Ask {
        way,
        address: to.address,
        count,
        interval: 0,
        timeout: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        mapped: false,
        fresh: true,
    };
    let answers = bed.cluster.ask(place, &question)?;
    let said = |answer: hachi_cluster::workload::ask::Answer| {
        let outcome = match (answer.name, answer.error.as_deref()) {
            (Some(name), _) => Outcome::Answered(name),
            (None, Some("ConnectionRefused")) => Outcome::Refused,
            // What packets would meet silence with is told to a process of the node.
            (None, Some("HostUnreachable" | "TimedOut" | "WouldBlock")) => Outcome::Silent,
            (None, error) => Outcome::Failed(error.unwrap_or_default().to_owned()),
        };
        Said {
            outcome,
            client: answer.client.map(|client| client.ip()),
            denied: answer.error.as_deref() == Some("HostUnreachable"),
        }
    };
    Ok(answers.into_iter().map(said).collect())
}

impl Question {
    fn check(&self, bed: &Bed) -> Result<()> {
        let once = |wait| -> Result<Said> {
            let said = ask(bed, self.source, self.to, 1, Duration::from_millis(wait))?;
            said.into_iter().next().context("no outcome")
        };
        match &self.end {
            End::Reject => {
                let said = once(2000)?;
                match said.outcome {
                    Outcome::Refused => Ok(()),
                    _ => Err(said.unanswered().context("not rejected")),
                }
            }
            End::Drop => match once(300)?.outcome {
                Outcome::Silent => Ok(()),
                other => bail!("not dropped: {other}"),
            },
            End::Network(name) => {
                let said = once(1000)?;
                match &said.outcome {
                    Outcome::Answered(who) if who == name => Ok(()),
                    _ => Err(said.unanswered().context("not left to the network")),
                }
            }
            End::All(backends, client) => self.all(bed, backends, *client),
            End::One(backends) => self.one(bed, backends),
        }
    }

    /// Asks until everybody who should has answered, and as often again.
    fn all(&self, bed: &Bed, backends: &BTreeSet<String>, client: Client) -> Result<()> {
        const MOST: usize = 150;
        // One that is alone shows soon that it is.
        let batch = if backends.len() == 1 { 6 } else { 12 };
        let mut seen = BTreeSet::new();
        let mut times = 0;
        while times < MOST {
            let mut silence = None;
            for said in ask(bed, self.source, self.to, batch, Duration::from_secs(1))? {
                times += 1;
                let Outcome::Answered(who) = said.outcome else {
                    silence = Some(said.silence()?);
                    continue;
                };
                ensure!(backends.contains(&who), "answered by {who}");
                if let Some(seen) = said.client {
                    let may = client(bed, self.source, &who, self.to)?;
                    ensure!(may.contains(&seen), "{who} sees {seen}, not {may:?}");
                }
                seen.insert(who);
            }
            // Whoever did answer has been judged.
            if let Some(silence) = silence {
                return Err(silence.into());
            }
            if seen == *backends {
                return Ok(());
            }
        }
        bail!("only {seen:?} of {backends:?} answer")
    }

    fn one(&self, bed: &Bed, backends: &BTreeSet<String>) -> Result<()> {
        let (mut seen, mut silence) = (BTreeSet::new(), None);
        for said in ask(bed, self.source, self.to, 12, Duration::from_secs(1))? {
            let Outcome::Answered(who) = said.outcome else {
                silence = Some(said.silence()?);
                continue;
            };
            seen.insert(who);
        }
        ensure!(seen.is_subset(backends), "answered by {seen:?}");
        ensure!(seen.len() <= 1, "{seen:?} answer one client");
        if let Some(silence) = silence {
            return Err(silence.into());
        }
        ensure!(seen.len() == 1, "{seen:?} answer one client");
        Ok(())
    }
}

/// Asks all of them. Until the agents have taken everything in one may fail; in the end each must hold.
/// Those that are asked later have a second attempt too where nothing came, for a busy machine is late;
/// whatever does come is final.
pub(crate) fn all_hold(bed: &Bed, questions: &[Question]) -> Result<()> {
    const ASKERS: usize = 8;
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let start = Instant::now();
    let work = || {
        while let Some(question) = questions.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut again = true;
            let held = loop {
                match question.check(bed) {
                    Ok(()) => break Ok(()),
                    Err(_) if start.elapsed() <= LIMIT => {
                        std::thread::sleep(Duration::from_millis(100));
                    }
                    Err(error) if again && error.is::<Silence>() => again = false,
                    Err(error) => break Err(error),
                }
            };
            if let Err(error) = held {
                let Question {
                    what,
                    source,
                    to,
                    end,
                } = question;
                let end = match end {
                    End::All(backends, _) => format!("{backends:?}"),
                    other => format!("{other:?}"),
                };
                let text = format!("{source:?} -> {what} {to}: {error:#}; expected {end}");
                wrong
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(text);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..ASKERS {
            scope.spawn(work);
        }
    });
    let wrong = wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{} rows in {:.1?}", questions.len(), start.elapsed());
    ensure!(
        wrong.is_empty(),
        "{} of {} rows are wrong:\n{}",
        wrong.len(),
        questions.len(),
        wrong.join("\n")
    );
    Ok(())
}
