//! One who asks until he is told to stop.

use std::{
    io::{BufRead as _, BufReader},
    process::Child,
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::ask::Answer;

/// A process that asks, and what it has been answered.
#[derive(Debug)]
pub struct Asker {
    process: Child,
    lines: Receiver<String>,
    answers: Vec<Answer>,
}

impl Asker {
    /// Listens to a `hachi-pod ask` whose output is a pipe.
    pub(crate) fn of(mut process: Child) -> Result<Self> {
        let said = BufReader::new(process.stdout.take().context("a pipe")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut said = said.lines().map_while(Result::ok);
            said.try_for_each(|line| sender.send(line))
        });
        Ok(Self {
            process,
            lines,
            answers: Vec::new(),
        })
    }

    /// Waits until it has been answered.
    pub fn wait(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while self.answers.iter().all(|answer| answer.name.is_none()) {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.with_context(|| format!("no answer, only {:?}", self.answers))?;
            self.answers.push(Answer::parse(&line)?);
        }
        Ok(())
    }

    /// Ends it; returns all answers. An error if it has ended by itself.
    pub fn stop(mut self) -> Result<Vec<Answer>> {
        let ended = self.process.try_wait()?;
        ensure!(ended.is_none(), "it ended by itself: {ended:?}");
        self.process.kill()?;
        self.process.wait()?;
        let mut answers = std::mem::take(&mut self.answers);
        for line in &self.lines {
            answers.push(Answer::parse(&line)?);
        }
        Ok(answers)
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        // Of a test that has failed; else it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
