//! Short-lived programs, with errors that show what they said.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Runs `ip -batch` with one command a line, in the calling thread's network namespace.
pub(crate) fn ip_batch(script: &str) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    let output = with_input(&mut command, script.as_bytes())
        .context("run `ip` (install the package iproute2)")?;
    if !output.status.success() {
        bail!(
            "ip -batch: {}\n{}",
            String::from_utf8_lossy(&output.stderr).trim(),
            script.trim()
        );
    }
    Ok(())
}

/// Runs a program to its end with bytes on its standard input, and returns what it wrote.
pub(crate) fn with_input(command: &mut Command, input: &[u8]) -> Result<Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", command.get_program().to_string_lossy()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that exits without reading is judged by its exit status, not by this.
        let _ = stdin.write_all(input);
    }
    child.wait_with_output().context("wait for the program")
}

/// Finds a binary of this crate: beside the running program, one directory up (test programs are in
/// `deps/`), or among the finished ones.
pub(crate) fn own_binary(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe().context("find the running program")?;
    let beside = here.ancestors().skip(1).take(2).map(Path::to_path_buf);
    let dist = std::env::var_os("HACHI_DIST").map(PathBuf::from);
    let found = beside
        .chain(dist)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        let here = here.display();
        format!("no {name} beside {here}; build it: cargo build -p hachi-cluster --bins")
    })
}
