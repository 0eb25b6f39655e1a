//! A datagram every millisecond, to find the very packet from which on a policy was obeyed.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    netns::Netns,
    workload::{probe::unspecified, serve::make_room},
};

/// The time between two datagrams.
const INTERVAL: Duration = Duration::from_millis(1);

/// How long answers to the last datagrams are waited for, where some are not expected to come.
const GRACE: Duration = Duration::from_millis(100);

/// How long where all are: a machine that is busy with other things is late, and has lost nothing.
const PATIENCE: Duration = Duration::from_secs(5);

/// One datagram.
#[derive(Clone, Copy, Debug)]
pub struct Beat {
    /// When it was sent.
    pub sent: Instant,
    /// Whether its answer came.
    pub answered: bool,
}

/// A pulse that beats on a thread of its own.
#[derive(Debug)]
pub struct Pulse {
    /// Set when it is to stop, to how long it still waits for answers.
    stop: Arc<OnceLock<Duration>>,
    sent: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
    thread: JoinHandle<Vec<Beat>>,
}

impl Pulse {
    /// Starts it, from one socket: all of it is one flow.
    pub fn start(from: &Netns, to: SocketAddr) -> Result<Self> {
        let open = || -> std::io::Result<UdpSocket> {
            let socket = UdpSocket::bind(unspecified(to))?;
            make_room(&socket);
            socket.connect(to)?;
            Ok(socket)
        };
        let socket = from
            .enter(open)?
            .with_context(|| format!("open a socket for {to}"))?;
        let stop = Arc::new(OnceLock::new());
        let (sent, answered) = (Arc::default(), Arc::default());
        let (stopped, all, count) = (Arc::clone(&stop), Arc::clone(&sent), Arc::clone(&answered));
        Ok(Self {
            stop,
            sent,
            answered,
            thread: thread::spawn(move || beat(&socket, &stopped, &all, &count)),
        })
    }

    /// Beats so far: none come from a machine that is too busy to send them.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Answers that have come so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends it, and returns every beat.
    pub fn stop(self) -> Result<Vec<Beat>> {
        self.end(GRACE)
    }

    /// As [`Self::stop`], where every beat should have its answer, be it late.
    pub fn settle(self) -> Result<Vec<Beat>> {
        self.end(PATIENCE)
    }

    fn end(self, grace: Duration) -> Result<Vec<Beat>> {
        let _ = self.stop.set(grace);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the pulse's thread panicked"))
    }
}

fn beat(
    socket: &UdpSocket,
    stop: &OnceLock<Duration>,
    sent: &AtomicU64,
    answered: &AtomicU64,
) -> Vec<Beat> {
    let mut beats: Vec<Beat> = Vec::new();
    let mut next = Instant::now();
    while stop.get().is_none() {
        let number = beats.len().to_string();
        // An error here is an ICMP answer to an earlier beat; with it, nothing was sent.
        if socket.send(number.as_bytes()).is_err() {
            let _ = socket.send(number.as_bytes());
        }
        beats.push(Beat {
            sent: Instant::now(),
            answered: false,
        });
        sent.fetch_add(1, Ordering::Relaxed);
        next += INTERVAL;
        collect(socket, &mut beats, next, answered);
        next = next.max(Instant::now());
    }
    let until = Instant::now() + stop.get().copied().unwrap_or(GRACE);
    while beats.iter().any(|beat| !beat.answered) && Instant::now() < until {
        let next = until.min(Instant::now() + GRACE);
        collect(socket, &mut beats, next, answered);
    }
    beats
}

/// Notes answers until a moment.
fn collect(socket: &UdpSocket, beats: &mut [Beat], until: Instant, answered: &AtomicU64) {
    let mut buffer = [0; 512];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || socket.set_read_timeout(Some(left)).is_err() {
            return;
        }
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let reply = String::from_utf8_lossy(&buffer[..length]);
                let number = reply
                    .rsplit(' ')
                    .next()
                    .and_then(|number| number.parse().ok());
                if let Some(beat) = number.and_then(|number: usize| beats.get_mut(number)) {
                    beat.answered = true;
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            // Refused: an answer of another kind, and no reason to spin.
            Err(_) => thread::sleep(left.min(Duration::from_micros(100))),
        }
    }
}

/// How long after an event the first packet was sent from which on none was answered.
#[must_use]
pub fn closed_after(beats: &[Beat], event: Instant) -> Option<Duration> {
    let last = beats.iter().rposition(|beat| beat.answered)?;
    let first = beats.get(last + 1)?;
    Some(first.sent.saturating_duration_since(event))
}

/// How long after an event the first packet was sent that was answered again.
#[must_use]
pub fn opened_after(beats: &[Beat], event: Instant) -> Option<Duration> {
    // One that was on its way when the event came may profit from it already.
    let after = beats.iter().filter(|beat| beat.sent + INTERVAL >= event);
    let first = after.into_iter().find(|beat| beat.answered)?;
    Some(first.sent.saturating_duration_since(event))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beats(start: Instant, answered: &[u8]) -> Vec<Beat> {
        let at = |index: usize| start + INTERVAL * u32::try_from(index).unwrap();
        answered
            .iter()
            .enumerate()
            .map(|(index, answer)| Beat {
                sent: at(index),
                answered: *answer == 1,
            })
            .collect()
    }

    #[test]
    fn a_lost_packet_is_not_taken_for_the_change() {
        let start = Instant::now();
        let beats = beats(start, &[1, 1, 0, 1, 1, 0, 0, 0]);
        assert_eq!(closed_after(&beats, start + INTERVAL), Some(INTERVAL * 4));
    }

    #[test]
    fn a_flow_that_never_closes_has_no_time() {
        let start = Instant::now();
        assert_eq!(closed_after(&beats(start, &[1, 1, 1]), start), None);
        assert_eq!(closed_after(&beats(start, &[0, 0]), start), None);
    }

    #[test]
    fn the_first_answer_after_the_event_counts() {
        let start = Instant::now();
        let beats = beats(start, &[0, 0, 0, 1, 1]);
        assert_eq!(opened_after(&beats, start + INTERVAL), Some(INTERVAL * 2));
        assert_eq!(opened_after(&beats[..3], start), None);
    }
}
