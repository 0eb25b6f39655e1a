//! `hachi-cni`: the CNI plugin.
//!
//! ```text
//! environment + stdin ─> Env, Conf ─> op::{add,del,check,gc,status} ─> result on stdout
//!                        (validated)   │ Store, wire(), agent socket
//!                                      └ failed: error object on stdout, exit status 1
//! ```
//! It follows version 1.1.0 of the CNI specification and speaks every version from 0.3.0 on. It
//! starts no process and keeps nothing running. Error codes of its own are in [`error::code`].
#![forbid(unsafe_code)]

mod agent;
mod args;
mod conf;
mod env;
mod error;
mod fields;
mod op;
mod pool;
mod prev;
mod result;
mod version;

use std::{
    io::{self, Read as _, Write as _},
    process::ExitCode,
};

use crate::{
    conf::Conf,
    env::{Command, Env},
    error::{Error, code},
    version::Version,
};

/// The largest configuration that is read, bytes.
const MAX_CONF: u64 = 1 << 20;

fn main() -> ExitCode {
    // A panic is a bug; the runtime gets an error object all the same.
    std::panic::set_hook(Box::new(|panic| {
        let error = Error::new(code::INTERNAL, "the plugin has a bug").details(panic);
        let _ = print(&error.to_json(None));
        std::process::exit(1);
    }));
    let Some(env) = Env::read() else {
        eprintln!(
            "Hachi CNI plugin v{}\nCNI protocol versions supported: {}",
            env!("CARGO_PKG_VERSION"),
            Version::ALL.map(Version::as_str).join(", ")
        );
        return ExitCode::SUCCESS;
    };
    let mut version = None;
    match env.and_then(|env| run(&env, &mut version)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Err(failed) = print(&error.to_json(version)) {
                eprintln!("hachi-cni: {error}; and cannot write that to stdout: {failed}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(env: &Env, version: &mut Option<Version>) -> Result<(), Error> {
    let command = match env.command {
        Command::Version => return write(&result::version()),
        command => command,
    };
    let (found, mut fields) = conf::decode(&read_conf()?)?;
    *version = Some(found);
    if found < command.since() {
        let why = format!(
            "{} needs cniVersion {} or later",
            command.name(),
            command.since()
        );
        return Err(Error::new(code::INCOMPATIBLE_VERSION, why).details(found));
    }
    if fields.is("type", op::LOOPBACK) {
        return op::loopback(env, found, &mut fields, write);
    }
    let conf = Conf::parse(found, fields)?;
    match command {
        Command::Add => op::add(env, &conf, write),
        Command::Del => op::del(env, &conf),
        Command::Check => op::check(env, &conf),
        Command::Gc => op::gc(&conf),
        Command::Status => op::status(&conf),
        Command::Version => Ok(()),
    }
}

fn read_conf() -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    io::stdin()
        .lock()
        .take(MAX_CONF + 1)
        .read_to_end(&mut text)
        .map_err(|error| Error::new(code::IO, "cannot read the configuration").details(error))?;
    if text.len() as u64 > MAX_CONF {
        let why = format!("the configuration is longer than {MAX_CONF} bytes");
        return Err(Error::new(code::DECODING, why));
    }
    Ok(text)
}

fn write(value: &serde_json::Value) -> Result<(), Error> {
    print(value).map_err(|error| Error::new(code::IO, "cannot write the result").details(error))
}

fn print(value: &serde_json::Value) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{value:#}")?;
    stdout.flush()
}
