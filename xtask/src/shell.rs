//! Runs commands as named steps: one line each with its duration, everything else in a log file
//! whose tail is shown when the step fails.
//!
//! ```text
//!   eBPF object                      12.3 s
//!   binaries                         48 s, Compiling kube-client v5.0.0 ...
//! ```

use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::repo::Repo;

/// Lines of a failed step's log that are shown.
const TAIL: usize = 40;
/// How often a long step says that it is alive where the output is not a terminal.
const HEARTBEAT: Duration = Duration::from_secs(20);

/// Runs the steps of one invocation.
pub(crate) struct Shell {
    logs: PathBuf,
    terminal: bool,
}

/// What a finished step left.
pub(crate) struct Done {
    /// How the command ended.
    pub(crate) status: ExitStatus,
    /// Standard output (and standard error, unless they were split).
    pub(crate) log: PathBuf,
}

impl Done {
    /// Everything the command printed, as text.
    pub(crate) fn text(&self) -> Result<String> {
        let bytes = std::fs::read(&self.log)
            .with_context(|| format!("cannot read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

impl Shell {
    /// A shell that keeps its logs under the checkout's `target/`.
    pub(crate) fn new(repo: &Repo) -> Result<Self> {
        let logs = repo.target("xtask/log");
        std::fs::create_dir_all(&logs)
            .with_context(|| format!("cannot create {}", logs.display()))?;
        Ok(Self {
            logs,
            terminal: std::io::stderr().is_terminal(),
        })
    }

    /// Prints one line of progress.
    pub(crate) fn say(&self, line: &str) {
        eprintln!("{line}");
    }

    /// Runs a command to its end; a failure shows the log's tail.
    pub(crate) fn step(&self, name: &str, command: &mut Command) -> Result<()> {
        let log = self.log_path(name, "log");
        let file = File::create(&log)?;
        command.stdout(file.try_clone()?).stderr(file);
        let done = self.watch(name, command, log, None, None)?;
        self.judge(name, &done.status, &done.log)
    }

    /// Runs a command to its end and returns its standard output; standard error is logged.
    pub(crate) fn output(&self, name: &str, command: &mut Command) -> Result<String> {
        let out = self.log_path(name, "out");
        let log = self.log_path(name, "log");
        command
            .stdout(File::create(&out)?)
            .stderr(File::create(&log)?);
        let done = self.watch(name, command, log, None, None)?;
        self.judge(name, &done.status, &done.log)?;
        Ok(String::from_utf8_lossy(&std::fs::read(&out)?).into_owned())
    }

    /// Runs a command for at most `limit` and returns how it ended, good or bad; both outputs
    /// are in the log. `summary` makes the text at the end of the step's line from the log.
    pub(crate) fn attempt(
        &self,
        name: &str,
        command: &mut Command,
        limit: Duration,
        summary: &dyn Fn(&Done) -> String,
    ) -> Result<Done> {
        let log = self.log_path(name, "log");
        let file = File::create(&log)?;
        command.stdout(file.try_clone()?).stderr(file);
        self.watch(name, command, log, Some(limit), Some(summary))
    }

    /// Shows the last lines of a log.
    pub(crate) fn show_tail(&self, log: &Path) {
        eprintln!("{}", tail(log, TAIL));
    }

    fn log_path(&self, name: &str, extension: &str) -> PathBuf {
        let file: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        self.logs.join(format!("{file}.{extension}"))
    }

    fn judge(&self, name: &str, status: &ExitStatus, log: &Path) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        self.show_tail(log);
        bail!(
            "{name} failed ({status}); the whole log is {}",
            log.display()
        )
    }

    fn watch(
        &self,
        name: &str,
        command: &mut Command,
        log: PathBuf,
        limit: Option<Duration>,
        summary: Option<&dyn Fn(&Done) -> String>,
    ) -> Result<Done> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        let started = Instant::now();
        let mut said = Duration::ZERO;
        let mut timed_out = false;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            let elapsed = started.elapsed();
            if limit.is_some_and(|limit| elapsed > limit) {
                timed_out = true;
                break stop(&mut child)?;
            }
            self.alive(name, &log, elapsed, &mut said);
            // A fine grain at first, so that what is already built costs nothing.
            std::thread::sleep(Duration::from_millis(if elapsed.as_millis() < 500 {
                5
            } else {
                50
            }));
        };
        let done = Done { status, log };
        let end = if timed_out {
            "stopped at its time limit".to_owned()
        } else if let Some(summary) = summary {
            summary(&done)
        } else if status.success() {
            String::new()
        } else {
            "FAILED".to_owned()
        };
        self.finish(name, started.elapsed(), &end);
        Ok(done)
    }

    fn alive(&self, name: &str, log: &Path, elapsed: Duration, said: &mut Duration) {
        let due = if self.terminal {
            Duration::from_secs(1)
        } else {
            HEARTBEAT
        };
        if elapsed < *said + due {
            return;
        }
        *said = elapsed;
        let last = tail(log, 1);
        let last: String = last.trim().chars().take(60).collect();
        if self.terminal {
            eprint!("\r\x1b[K  {name:<32} {:>8}  {last}", seconds(elapsed));
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("  {name:<32} {:>8}, goes on: {last}", seconds(elapsed));
        }
    }

    fn finish(&self, name: &str, elapsed: Duration, end: &str) {
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        let line = format!("{clear}  {name:<32} {:>8}  {end}", seconds(elapsed));
        eprintln!("{}", line.trim_end());
    }
}

/// Asks a child to stop as Ctrl-C would, then makes it.
fn stop(child: &mut Child) -> Result<ExitStatus> {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    let pid = Pid::from_raw(i32::try_from(child.id()).context("process id")?);
    // It may be gone already; the wait below tells.
    let _ = kill(pid, Signal::SIGINT);
    for _ in 0..100 {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().context("cannot kill the child")?;
    Ok(child.wait()?)
}

/// A duration for people.
pub(crate) fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 100.0 {
        format!("{seconds:.1} s")
    } else {
        format!(
            "{} min {:02} s",
            duration.as_secs() / 60,
            duration.as_secs() % 60
        )
    }
}

/// The last lines of a file; nothing if it cannot be read.
fn tail(path: &Path, lines: usize) -> String {
    const WINDOW: u64 = 16 * 1024;
    let Ok(mut file) = File::open(path) else {
        return String::new();
    };
    let length = file.metadata().map_or(0, |meta| meta.len());
    let mut bytes = Vec::new();
    if file
        .seek(SeekFrom::Start(length.saturating_sub(WINDOW)))
        .is_err()
        || file.read_to_end(&mut bytes).is_err()
    {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(seconds(Duration::from_millis(1_234)), "1.2 s");
        assert_eq!(seconds(Duration::from_secs(754)), "12 min 34 s");
    }

    #[test]
    fn the_tail_is_the_last_lines() -> Result<()> {
        let path = std::env::temp_dir().join(format!("hachi-tail-{}", std::process::id()));
        std::fs::write(&path, "one\ntwo\nthree\n")?;
        assert_eq!(tail(&path, 2), "two\nthree");
        assert_eq!(tail(&path, 9), "one\ntwo\nthree");
        std::fs::remove_file(&path)?;
        assert_eq!(tail(&path, 2), "");
        Ok(())
    }
}
