//! The processes of the real API: started in their namespace, and each can be started anew.

use std::{
    path::{Path, PathBuf},
    process::Child,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    names::ClusterId,
    spawn::{Launch, Place},
};

/// Running processes, and where they come from and go to.
#[derive(Debug)]
pub(super) struct Processes {
    assets: PathBuf,
    id: ClusterId,
    logs: PathBuf,
    place: Place,
    running: Mutex<Vec<Process>>,
}

#[derive(Debug)]
struct Process {
    name: &'static str,
    arguments: Vec<String>,
    child: Child,
}

impl Processes {
    pub(super) fn new(assets: &Path, id: &ClusterId, logs: &Path, place: Place) -> Self {
        Self {
            assets: assets.to_owned(),
            id: id.clone(),
            logs: logs.to_owned(),
            place,
            running: Mutex::default(),
        }
    }

    fn running(&self) -> MutexGuard<'_, Vec<Process>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, name: &str, arguments: &[String]) -> Result<Child> {
        let parent = std::process::id().to_string();
        let flags = ["--die-with", parent.as_str()];
        let program = self.assets.join(name);
        let mut launch = Launch::new(&self.place, &self.id, &flags, program)?;
        launch.command().args(arguments);
        launch.log_to(&self.logs.join(format!("{name}.log")))?;
        launch.start()
    }

    /// Starts a program of the assets.
    pub(super) fn launch(&self, name: &'static str, arguments: Vec<String>) -> Result<()> {
        let child = self.start(name, &arguments)?;
        self.running().push(Process {
            name,
            arguments,
            child,
        });
        Ok(())
    }

    /// Ends one of them, at once, and starts it again as it was.
    pub(super) fn restart(&self, name: &str) -> Result<()> {
        let mut running = self.running();
        let mut found = running.iter_mut();
        let process = found
            .find(|process| process.name == name)
            .with_context(|| format!("{name} was not started"))?;
        // One that has ended by itself is as good.
        let _ = process.child.kill();
        let _ = process.child.wait();
        process.child = self.start(name, &process.arguments)?;
        Ok(())
    }

    /// Fails if one has ended.
    pub(super) fn check(&self) -> Result<()> {
        for Process { name, child, .. } in self.running().iter_mut() {
            if let Some(status) = child.try_wait().context("look after the API")? {
                bail!(
                    "{name} ended ({status}); see its log in {}",
                    self.logs.display()
                );
            }
        }
        Ok(())
    }

    /// Ends them, the last one first.
    pub(super) fn end(&mut self) {
        let running = self
            .running
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for mut process in running.drain(..).rev() {
            // One that has ended by itself is as good.
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }
}
