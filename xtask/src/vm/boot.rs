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
/// The longest that a guest may run: twice what one takes that shares two processors with another.
const LIMIT: Duration = Duration::from_secs(50 * 60);
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
        let ran = self.boot(&machine, &mut |test| {
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

    /// Boots, and says nothing.
    pub(crate) fn quietly(&self, repo: &Repo) -> Result<(Ran, Machine)> {
        let machine = self.machine(repo);
        let ran = self.boot(&machine, &mut |_| ())?;
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

    fn boot(&self, machine: &Machine, ended: &mut dyn FnMut(&Test)) -> Result<Ran> {
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
        let mut report = Report::default();
        let end = machine.run(&mut |line| {
            if let Some(test) = report.line(line) {
                ended(test);
            }
        })?;
        fs::remove_file(&machine.initramfs).context("cannot remove the initramfs")?;
        let broken = (!report.done).then(|| broken(&report, end));
        Ok(Ran { report, broken })
    }
}

/// What happened to a guest that was not through.
fn broken(report: &Report, end: End) -> String {
    let during = match &report.running {
        Some(test) => format!("during {}", test.name),
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
