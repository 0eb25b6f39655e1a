//! Boots a machine and watches it until it ends, however it ends.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How a machine's run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// QEMU ended by itself.
    PoweredOff,
    /// Nothing came from either terminal for this long.
    Silent(Duration),
    /// It was still at work at the limit.
    TimeLimit(Duration),
}

/// How the guest's instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Accelerator {
    /// KVM where it works, TCG elsewhere
    Auto,
    /// The processor's virtualisation
    Kvm,
    /// QEMU's translator
    Tcg,
}

/// A machine to boot.
pub(crate) struct Machine {
    /// The kernel's image.
    pub(crate) image: PathBuf,
    /// Its first file system.
    pub(crate) initramfs: PathBuf,
    /// Where its terminals are logged.
    pub(crate) logs: PathBuf,
    /// How to run it.
    pub(crate) accelerator: Accelerator,
    /// It is stopped when it is this long silent.
    pub(crate) silence: Duration,
    /// It is stopped after this long.
    pub(crate) limit: Duration,
}

/// The translator, one processor of the guest at a time: with a thread for each, one may run what was
/// translated from an instruction that another has just replaced, and the kernel dies of an int3 of its
/// own, as it patches itself at boot and whenever a hook is first used.
const TCG: &str = "tcg,thread=single";

/// How long a guest under KVM may take to say anything, before the translator is tried.
const FIRST_WORDS: Duration = Duration::from_secs(10);

/// Kills QEMU on every way out.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// The kernel's console.
    pub(crate) fn console(&self) -> PathBuf {
        self.logs.join("console.log")
    }

    /// The tests' output.
    pub(crate) fn tests(&self) -> PathBuf {
        self.logs.join("tests.log")
    }

    /// Boots and watches; every new line of the tests' output goes to `line`.
    pub(crate) fn run(&self, line: &mut dyn FnMut(&str)) -> Result<End> {
        match self.accelerator {
            Accelerator::Kvm => self.attempt("kvm", self.silence, line),
            Accelerator::Tcg => self.attempt(TCG, self.silence, line),
            Accelerator::Auto => {
                // A machine that is virtual itself may offer KVM and fail at it, at once or by
                // never starting, or halfway: only one whose first process ran counts.
                if File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/kvm")
                    .is_ok()
                    && let Ok(end) = self.attempt("kvm", FIRST_WORDS, line)
                    && fs::metadata(self.tests()).is_ok_and(|meta| meta.len() > 0)
                {
                    return Ok(end);
                }
                self.attempt(TCG, self.silence, line)
            }
        }
    }

    /// `first` is how long the guest may take to say anything at all.
    fn attempt(
        &self,
        accelerator: &str,
        first: Duration,
        line: &mut dyn FnMut(&str),
    ) -> Result<End> {
        fs::create_dir_all(&self.logs)?;
        let mut watched = [Tail::new(&self.console())?, Tail::new(&self.tests())?];
        let errors = self.logs.join("qemu.log");
        let child = self
            .command(accelerator)
            .stderr(File::create(&errors)?)
            .spawn();
        let mut qemu = Guard(child.context("cannot run qemu-system-x86_64")?);
        let started = Instant::now();
        let mut heard = started;
        let mut silence = first;
        loop {
            // Asked before the terminals are read: what it wrote last is not missed.
            let status = qemu.0.try_wait()?;
            for (index, tail) in watched.iter_mut().enumerate() {
                let lines = tail.lines()?;
                if !lines.is_empty() {
                    heard = Instant::now();
                    silence = self.silence;
                }
                if index == 1 {
                    lines.iter().for_each(|text| line(text));
                }
            }
            match status {
                Some(status) if status.success() => return Ok(End::PoweredOff),
                Some(status) => {
                    bail!(
                        "QEMU failed ({status}): {}",
                        fs::read_to_string(&errors)?.trim()
                    )
                }
                None if heard.elapsed() > silence => return Ok(End::Silent(silence)),
                None if started.elapsed() > self.limit => return Ok(End::TimeLimit(self.limit)),
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn command(&self, accelerator: &str) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", accelerator]);
        command
            .args([
                "-cpu",
                "max",
                "-smp",
                "2",
                "-m",
                "2048",
                "-nodefaults",
                "-no-reboot",
            ])
            .args(["-display", "none", "-monitor", "none"])
            .arg("-kernel")
            .arg(&self.image)
            .arg("-initrd")
            .arg(&self.initramfs)
            // Any oops is a panic, and a panic is a reset, at which QEMU ends. Nobody attacks this
            // machine, and mitigations cost the translator dearly. A host that is busy keeps the timer
            // waiting for so long that a kernel which tests it gives up.
            .args([
                "-append",
                "console=ttyS0 loglevel=5 panic=-1 oops=panic random.trust_cpu=on mitigations=off \
                 audit=0 no_timer_check",
            ]);
        for log in [self.console(), self.tests()] {
            command
                .arg("-serial")
                .arg(format!("file:{}", log.display()));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }
}

/// A growing file, line by line.
struct Tail {
    file: File,
    rest: Vec<u8>,
}

impl Tail {
    fn new(path: &Path) -> Result<Self> {
        File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            file: File::open(path)?,
            rest: Vec::new(),
        })
    }

    /// The lines that were completed since the last call.
    fn lines(&mut self) -> Result<Vec<String>> {
        self.file.read_to_end(&mut self.rest)?;
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else {
            return Ok(Vec::new());
        };
        let whole: Vec<u8> = self.rest.drain(..=end).collect();
        Ok(String::from_utf8_lossy(&whole)
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_growing_file_is_read_by_lines() -> Result<()> {
        let path = std::env::temp_dir().join(format!("hachi-grow-{}", std::process::id()));
        let mut tail = Tail::new(&path)?;
        let mut file = File::options().append(true).open(&path)?;
        assert!(tail.lines()?.is_empty());
        file.write_all(b"one\r\ntw")?;
        assert_eq!(tail.lines()?, ["one"]);
        file.write_all(b"o\n")?;
        assert_eq!(tail.lines()?, ["two"]);
        fs::remove_file(&path)?;
        Ok(())
    }
}
