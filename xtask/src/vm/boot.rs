//! One machine, from its file system to what is to be said of its run.

use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::repo::Repo;
use crate::shell::{Shell, seconds};
use crate::test::{show_failures, unrun};

use super::image::{self, Plant, Programs, Scope};
use super::kernel::Kernel;
use super::module;
use super::qemu::{Accelerator, End, Machine};
use super::report::{Report, Test};

/// The longest that one test program may take, in seconds; the translator is slow.
const TEST_LIMIT: u64 = 1200;
/// The longest that a guest may be silent: longer than one test takes.
const SILENCE: Duration = Duration::from_secs(360);
/// The longest that a guest may run: three times what one takes that shares two processors with another.
const LIMIT: Duration = Duration::from_secs(50 * 60);
/// How often a guest is booted that ends, or whose kernel hangs, before anything of it is tested.
const BOOTS: usize = 3;
/// With a planted hang: nobody wants to wait that long for what is known.
pub(crate) const PLANTED_SILENCE: Duration = Duration::from_secs(30);

/// What to boot.
pub(crate) struct Orders<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) programs: &'a Programs,
    pub(crate) object: &'a [u8],
    /// A fault to put in.
    pub(crate) plant: Option<Plant>,
    pub(crate) accelerator: Accelerator,
}

/// How a machine's run went.
pub(crate) struct Ran {
    pub(crate) report: Report,
    /// What happened, if it was not through.
    pub(crate) broken: Option<String>,
}

impl Orders<'_> {
    /// Boots, and says what happens and what went wrong, with the guest's own words.
    pub(crate) fn tell(&self, repo: &Repo, shell: &Shell) -> Result<Report> {
        let name = self.name();
        let machine = self.machine(repo);
        shell.say(&format!("  vm-{name}: boot"));
        let ran = self.boot(&machine, shell, &mut |test| {
            let took = seconds(Duration::from_millis(test.milliseconds));
            let how = if test.status == "0" {
                String::new()
            } else {
                format!(" ({})", test.status)
            };
            let step = format!("vm-{name}: {}", test.name);
            shell.say(&format!("  {step:<32} {took:>8}  {}{how}", test.counts()));
            unrun(&test.output).for_each(|line| shell.say(&format!("    {line}")));
        })?;
        explain(shell, &name, &machine, &ran)?;
        Ok(ran.report)
    }

    /// Boots, and says nothing but that a boot failed.
    pub(crate) fn quietly(&self, repo: &Repo, shell: &Shell) -> Result<(Ran, Machine)> {
        let machine = self.machine(repo);
        let ran = self.boot(&machine, shell, &mut |_| ())?;
        Ok((ran, machine))
    }

    /// The kernel's name and the fault's, for files and lines.
    fn name(&self) -> String {
        let name = self.kernel.name.replace('/', "-");
        match self.plant {
            Some(plant) => format!("{name}-{plant:?}").to_lowercase(),
            None => name,
        }
    }

    fn machine(&self, repo: &Repo) -> Machine {
        let name = self.name();
        let planted = self.plant == Some(Plant::Hang);
        Machine {
            image: self.kernel.image.clone(),
            initramfs: repo.target("vm").join(format!("{name}.cpio")),
            logs: repo.target("vm/log").join(&name),
            accelerator: self.accelerator,
            silence: if planted { PLANTED_SILENCE } else { SILENCE },
            limit: LIMIT,
        }
    }

    fn boot(&self, machine: &Machine, shell: &Shell, ended: &mut dyn FnMut(&Test)) -> Result<Ran> {
        let modules = match &self.kernel.modules {
            Some(directory) if self.programs.scope() != Scope::Verifier => {
                module::collect(directory)?
            }
            _ => Vec::new(),
        };
        image::write(
            &machine.initramfs,
            self.object,
            self.programs,
            &modules,
            self.plant,
            TEST_LIMIT,
        )?;
        // A panic that was planted is there at each boot.
        let boots = match self.plant {
            Some(Plant::Panic) => 1,
            Some(Plant::Verifier | Plant::Hang) | None => BOOTS,
        };
        let (report, end) = until_tested(
            boots,
            || {
                let mut report = Report::default();
                let end = machine.run(&mut |line| {
                    if let Some(test) = report.line(line) {
                        ended(test);
                    }
                })?;
                Ok((report, end))
            },
            |broken| {
                let name = self.name();
                shell.say(&format!(
                    "  vm-{name}: {broken}; booted again; its console ended:"
                ));
                shell.show_tail(&machine.console());
            },
        )?;
        fs::remove_file(&machine.initramfs).context("cannot remove the initramfs")?;
        let broken = (!report.done).then(|| broken(&report, end));
        Ok(Ran { report, broken })
    }
}

/// Runs a guest, at most this many times, until something of it is tested; `again` is told what
/// happened instead. One that comes up and then does nothing has hung, as a plant has it do.
fn until_tested(
    boots: usize,
    mut run: impl FnMut() -> Result<(Report, End)>,
    mut again: impl FnMut(&str),
) -> Result<(Report, End)> {
    for _ in 1..boots {
        let (report, end) = run()?;
        let died = !report.up || end == End::PoweredOff;
        if report.done || report.running.is_some() || !report.tests.is_empty() || !died {
            return Ok((report, end));
        }
        again(&broken(&report, end));
    }
    run()
}

/// What happened to a guest that was not through.
fn broken(report: &Report, end: End) -> String {
    let during = match &report.running {
        Some(test) => format!("during {}", test.name),
        None if !report.up => "before its first process".to_owned(),
        None if report.tests.is_empty() => "before the first test".to_owned(),
        None => "between tests".to_owned(),
    };
    let how = match end {
        End::PoweredOff => "the guest ended (a panic?)".to_owned(),
        End::Silent(time) => format!("the guest hung: silent for {}, stopped", seconds(time)),
        End::TimeLimit(time) => format!("the guest was not done after {}, stopped", seconds(time)),
    };
    format!("{how} {during}")
}

/// Says what went wrong.
fn explain(shell: &Shell, name: &str, machine: &Machine, ran: &Ran) -> Result<()> {
    // Several machines may end at once; each says its piece whole.
    static ONE: Mutex<()> = Mutex::new(());
    let _whole = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let report = &ran.report;
    for remark in &report.remarks {
        shell.say(&format!("  vm-{name}: {remark}"));
    }
    for test in report.tests.iter().filter(|test| test.counts().failed > 0) {
        shell.say(&format!("  vm-{name}: {} failed:", test.name));
        show_failures(shell, &test.output);
    }
    let Some(broken) = &ran.broken else {
        return Ok(());
    };
    shell.say(&format!("  vm-{name}: FAILED: {broken}; its console ends:"));
    shell.show_tail(&machine.console());
    if let Some(test) = &report.running {
        shell.say(&format!("  vm-{name}: the last output of {}:", test.name));
        shell.show_tail(&machine.tests());
    }
    if machine
        .console()
        .metadata()
        .is_ok_and(|meta| meta.len() == 0)
    {
        bail!(
            "the guest printed nothing at all: is {} a kernel?",
            machine.image.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of guests that write these lines and end so, one after the other: of the last, whether it
    /// was through and what happened to it, and how many were followed by another.
    fn come_of(boots: usize, guests: &[(&[&str], End)]) -> Result<(bool, String, usize)> {
        let mut guests = guests.iter();
        let mut again = 0;
        let (report, end) = until_tested(
            boots,
            || {
                let mut report = Report::default();
                let (lines, end) = guests.next().context("one boot too many")?;
                for line in *lines {
                    report.line(line);
                }
                Ok((report, *end))
            },
            |_| again += 1,
        )?;
        Ok((report.done, broken(&report, end), again))
    }

    #[test]
    fn only_a_guest_of_which_nothing_was_tested_is_booted_again() -> Result<()> {
        const OFF: End = End::PoweredOff;
        const SILENT: End = End::Silent(PLANTED_SILENCE);
        let hung = |when: &str| format!("the guest hung: silent for 30.0 s, stopped {when}");
        let ended = |when: &str| format!("the guest ended (a panic?) {when}");
        let early = ended("before its first process");
        let dead: (&[&str], End) = (&[], OFF);
        for first in [dead, (&[], SILENT), (&["@up"], OFF)] {
            let (done, _, again) = come_of(3, &[first, (&["@up", "@done"], OFF)])?;
            assert!(done && again == 1, "{first:?}");
        }
        assert_eq!(come_of(3, &[dead; 3])?, (false, early.clone(), 2));
        assert_eq!(come_of(1, &[dead])?, (false, early, 0));
        // What is tested may be the cause of all that comes later.
        for (lines, end, what) in [
            (&["@up"][..], SILENT, hung("before the first test")),
            (&["@up", "@begin packet"], SILENT, hung("during packet")),
            (&["@up", "@begin packet"], OFF, ended("during packet")),
            (
                &["@up", "@begin a", "@end a 0 1"],
                OFF,
                ended("between tests"),
            ),
        ] {
            assert_eq!(come_of(3, &[(lines, end)])?, (false, what, 0));
        }
        Ok(())
    }
}
