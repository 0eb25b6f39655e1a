//! Puts each fault into a guest and sees that it is reported for what it is, within its time limit: a
//! watcher that never sees anything go wrong proves nothing.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::repo::Repo;
use crate::shell::{Shell, seconds};
use crate::versions::VM_KERNELS;

use super::boot::{Orders, PLANTED_SILENCE, Ran};
use super::image::{self, Plant};
use super::kernel;
use super::qemu::Accelerator;

/// What a guest takes to boot and to say something, on a slow machine.
const BOOT: Duration = Duration::from_secs(90);

/// Boots a guest for each fault, on the kernel that boots fastest.
pub(crate) fn run(repo: &Repo, shell: &Shell) -> Result<()> {
    let object = fs::read(repo.object()).context("cannot read the eBPF object")?;
    let programs = image::build(repo, shell, &["verified".to_owned()])?;
    image::carries(&programs, &object)?;
    let newest = VM_KERNELS.last().context("no kernel")?;
    let kernel = kernel::find(repo, shell, newest)?;
    let plants = Plant::value_variants();
    let found: Vec<Result<String>> = thread::scope(|scope| {
        let guests: Vec<_> = plants
            .iter()
            .map(|plant| {
                let orders = Orders {
                    kernel: &kernel,
                    programs: &programs,
                    object: &object,
                    plant: Some(*plant),
                    accelerator: Accelerator::Auto,
                };
                scope.spawn(move || one(repo, shell, &orders, *plant))
            })
            .collect();
        guests
            .into_iter()
            .map(|guest| guest.join().unwrap_or_else(|_| bail!("the watcher died")))
            .collect()
    });
    for (plant, found) in plants.iter().zip(found) {
        let text = found.with_context(|| format!("a planted fault was missed: {plant:?}"))?;
        shell.say(&format!("  planted {plant:?}: {text}"));
    }
    Ok(())
}

fn one(repo: &Repo, shell: &Shell, orders: &Orders<'_>, plant: Plant) -> Result<String> {
    let started = Instant::now();
    let (ran, machine) = orders.quietly(repo, shell)?;
    let took = started.elapsed();
    let console = fs::read_to_string(machine.console()).unwrap_or_default();
    let text = recognise(plant, &ran, &console).inspect_err(|_| {
        shell.say(&format!("  planted {plant:?}: its console ends:"));
        shell.show_tail(&machine.console());
        shell.say(&format!("  planted {plant:?}: its tests' output ends:"));
        shell.show_tail(&machine.tests());
    })?;
    let limit = match plant {
        Plant::Hang => BOOT + PLANTED_SILENCE,
        Plant::Verifier | Plant::Panic => BOOT,
    };
    ensure!(took < limit, "reported after {} only", seconds(took));
    Ok(format!("{text} ({})", seconds(took)))
}

/// What was said of a fault; an error if it was taken for something else.
fn recognise(plant: Plant, ran: &Ran, console: &str) -> Result<String> {
    ensure!(ran.report.counts().failed > 0, "the run passes");
    let broken = ran.broken.as_deref().unwrap_or_default();
    match plant {
        Plant::Hang => {
            let text = "the guest hung";
            ensure!(ran.report.up && broken.contains(text), "{broken:?}");
            Ok(broken.to_owned())
        }
        Plant::Panic => {
            ensure!(broken.contains("the guest ended"), "{broken:?}");
            let panic = console.lines().find(|line| line.contains("Kernel panic"));
            let panic = panic.context("the console has no panic")?;
            Ok(format!("{broken}: {}", panic.trim()))
        }
        Plant::Verifier => {
            ensure!(broken.is_empty(), "{broken:?}");
            let mut lines = ran.report.tests.iter().flat_map(|test| test.output.lines());
            let line = lines.find(|line| line.contains("verifier rejected"));
            Ok(line.context("no word of the verifier")?.trim().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::report::Report;

    fn ran(lines: &[&str], broken: Option<&str>) -> Ran {
        let mut report = Report::default();
        for line in lines {
            report.line(line);
        }
        Ran {
            report,
            broken: broken.map(str::to_owned),
        }
    }

    #[test]
    fn a_fault_is_not_taken_for_another() {
        let text = Some("the guest hung: silent for 30.0 s, stopped");
        let hung = ran(&["@up"], text);
        assert!(recognise(Plant::Hang, &hung, "").is_ok());
        assert!(recognise(Plant::Panic, &hung, "Kernel panic").is_err());
        assert!(recognise(Plant::Hang, &ran(&[], text), "").is_err());
        let ended = ran(
            &[],
            Some("the guest ended (a panic?) before its first process"),
        );
        assert!(recognise(Plant::Panic, &ended, "[1] Kernel panic - x").is_ok());
        assert!(recognise(Plant::Panic, &ended, "nothing").is_err());
        let refused = [
            "@begin packet_verified",
            "the kernel's verifier rejected from_pod; report this",
            "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
            "@end packet_verified 101 5",
            "@done",
        ];
        assert!(recognise(Plant::Verifier, &ran(&refused, None), "").is_ok());
        assert!(recognise(Plant::Hang, &ran(&refused, None), "").is_err());
        let passed = [
            "@begin packet_verified",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            "@end packet_verified 0 5",
            "@done",
        ];
        assert!(recognise(Plant::Verifier, &ran(&passed, None), "").is_err());
    }
}
