//! Shows every program of the object to this kernel's verifier, and leaves nothing behind: no pin,
//! no attachment, no map.

use aya::{Ebpf, EbpfLoader, programs::Program};

use crate::{
    Capacities, KernelError, SocketLb,
    datapath::{LOG_LEVEL, load_error, load_failure},
    layout::layouts,
    object::object,
    sockets::Constants,
};

/// What the verifier made of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The program's name in the object.
    pub program: String,
    /// Instructions that the verifier walked through; kernels before 5.16 do not tell.
    pub instructions: Option<u32>,
}

/// Loads every program of the object, whatever its kind, and returns them in the order of their
/// names.
///
/// # Errors
/// If there is no object or no permission, or if the verifier rejects a program. The first program
/// that is rejected ends it.
pub fn verify() -> Result<Vec<Verified>, KernelError> {
    let mut ebpf = open(object()?)?;
    let mut verified = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        load(name, program)?;
        let info = program
            .info()
            .map_err(|source| load_failure(name, source))?;
        verified.push(Verified {
            program: name.to_owned(),
            instructions: info.verified_instruction_count(),
        });
    }
    verified.sort_by(|a, b| a.program.cmp(&b.program));
    Ok(verified)
}

/// Opens the object with maps of its own, which are not pinned; those that take their memory at once
/// are small.
fn open(object: &[u8]) -> Result<Ebpf, KernelError> {
    let capacities = Capacities {
        conntrack: 4096,
        fragments: 512,
        nat: 2048,
        sockets: 1024,
        ..Capacities::default()
    };
    let mut loader = EbpfLoader::new();
    // As loaded without `--datapath-log`.
    loader.override_global(LOG_LEVEL, &0_u8, false);
    let constants = Constants::find(SocketLb::All);
    constants.patch(&mut loader);
    for layout in layouts(&capacities).values() {
        loader.map_max_entries(layout.name, layout.capacity.entries());
    }
    loader.load(object).map_err(load_error)
}

fn load(name: &str, program: &mut Program) -> Result<(), KernelError> {
    let result = match program {
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkMsg(program) => program.load(),
        Program::SkSkb(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SocketFilter(program) => program.load(),
        // Kinds that need to be told of a kernel function or an event: the datapath has none.
        _ => {
            return Err(KernelError::Missing {
                what: "way to load",
                name: name.to_owned(),
            });
        }
    };
    result.map_err(|source| load_failure(name, source))
}
