//! Loading: the object, its maps (those pinned earlier, or new ones), its programs.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Map, MapData, MapError, MapInfo, PerCpuArray},
    programs::{ProgramError, SchedClassifier},
};
use hachi_abi::{ABI_VERSION, Config, Counter, Reason, map};

use crate::{
    AttachMode, Capacities, DEFAULT_PIN_ROOT, Hook, KernelError, Role, SocketLb,
    bytes::{bytes_of, read},
    layout::{Layout, layouts},
    object::object,
    pins::Pins,
    sockets::Constants,
    table::Table,
    takeover,
};

/// The level of the programs' log records, patched in before the verifier runs: with 0 the
/// statements are dead code and cost nothing.
pub(crate) const LOG_LEVEL: &str = "AYA_LOG_LEVEL";

/// Lines of the verifier's log that are kept.
const VERIFIER_LINES: usize = 40;

/// How to load the datapath.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The directory on a BPF file system that holds all pins.
    pub pin_root: PathBuf,
    /// How programs are attached.
    pub attach: AttachMode,
    /// The level of the programs' own log records; none: they are compiled out.
    pub log_level: Option<tracing::Level>,
    /// The capacities of maps that do not exist yet.
    pub capacities: Capacities,
    /// Whose sockets [`Datapath::attach_sockets`] serves.
    pub sockets: SocketLb,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            pin_root: PathBuf::from(DEFAULT_PIN_ROOT),
            attach: AttachMode::default(),
            log_level: None,
            capacities: Capacities::default(),
            sockets: SocketLb::All,
        }
    }
}

/// The loaded datapath.
///
/// Dropping it changes nothing in the kernel: maps and attachments stay pinned, and the programs
/// go on working until another agent takes over or [`crate::remove_all`] is called.
#[derive(Debug)]
pub struct Datapath {
    pub(crate) options: LoadOptions,
    pub(crate) pins: Pins,
    pub(crate) ebpf: Ebpf,
    pub(crate) tables: BTreeMap<&'static str, Table>,
    /// The kernel has refused tcx.
    pub(crate) no_tcx: bool,
    /// The first revision that this generation judges under.
    pub(crate) first_revision: u32,
}

impl Datapath {
    /// Loads the programs, with the maps that an earlier agent pinned or new ones. Attaches
    /// nothing.
    ///
    /// # Errors
    /// If there is no object, no BPF file system or no permission, if a pinned map has another
    /// layout, or if the verifier rejects a program.
    pub fn load(options: &LoadOptions) -> Result<Self, KernelError> {
        let object = object()?;
        let pins = Pins::new(&options.pin_root, ABI_VERSION);
        pins.make()?;
        let layouts = layouts(&options.capacities);
        for layout in layouts.values() {
            check_pinned(layout, &pins.map(layout.name))?;
        }
        let first_revision = takeover::share(&pins, layouts.values())?;

        let mut ebpf = load_object(object, options, &pins, &layouts)?;
        let mut tables = BTreeMap::new();
        for layout in layouts.values() {
            if let Some(table) = table(&mut ebpf, layout, &pins)? {
                tables.insert(layout.name, table);
            }
        }
        load_programs(
            &mut ebpf,
            &[Role::Pod.hooks(), Role::Uplink.hooks()].concat(),
        )?;
        let datapath = Self {
            options: options.clone(),
            pins,
            ebpf,
            tables,
            no_tcx: false,
            first_revision,
        };
        datapath.mark_version()?;
        let orphans = datapath.remove_orphans()?;
        tracing::info!(pins = %datapath.pins.maps().display(), orphans, "datapath loaded");
        Ok(datapath)
    }

    pub(crate) fn table(&self, name: &'static str) -> Result<&Table, KernelError> {
        self.tables.get(name).ok_or_else(|| KernelError::Missing {
            what: "map",
            name: name.to_owned(),
        })
    }

    pub(crate) fn program(&self, hook: Hook) -> Result<&SchedClassifier, KernelError> {
        let name = hook.program();
        self.ebpf
            .program(name)
            .ok_or_else(|| KernelError::Missing {
                what: "program",
                name: name.to_owned(),
            })?
            .try_into()
            .map_err(|source: ProgramError| program_error(hook, source))
    }

    pub(crate) fn program_fd(&self, hook: Hook) -> Result<OwnedFd, KernelError> {
        let fd = self
            .program(hook)?
            .fd()
            .map_err(|source| program_error(hook, source))?;
        fd.as_fd()
            .try_clone_to_owned()
            .map_err(|source| program_error(hook, ProgramError::IOError(source)))
    }

    pub(crate) fn program_id(&self, hook: Hook) -> Result<u32, KernelError> {
        let info = self
            .program(hook)?
            .info()
            .map_err(|source| program_error(hook, source))?;
        Ok(info.id())
    }

    pub(crate) fn config(&self) -> Result<Config, KernelError> {
        let value = self.table(map::CONFIG)?.get(bytes_of(&0_u32))?;
        Ok(value.map_or_else(Config::default, |value| read(&value)))
    }

    pub(crate) fn set_config(&self, config: &Config) -> Result<(), KernelError> {
        self.table(map::CONFIG)?
            .put(bytes_of(&0_u32), bytes_of(config))
    }

    /// The revision under which flows are judged now; 0 until the first [`Datapath::apply`].
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn revision(&self) -> Result<u32, KernelError> {
        Ok(self.config()?.revision)
    }

    /// Packets and bytes by outcome, summed over the CPUs, in the order of [`Reason::ALL`].
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn counters(&self) -> Result<Vec<(Reason, Counter)>, KernelError> {
        let failed = |error: MapError| map_error(map::COUNTERS, "read", error);
        let map = self
            .ebpf
            .map(map::COUNTERS)
            .ok_or_else(|| KernelError::Missing {
                what: "map",
                name: map::COUNTERS.to_owned(),
            })?;
        let counters = PerCpuArray::<_, Counter>::try_from(map).map_err(failed)?;
        Reason::ALL
            .iter()
            .map(|reason| {
                let values = counters.get(&u32::from(*reason as u8), 0).map_err(failed)?;
                let sum = values
                    .iter()
                    .fold(Counter::default(), |sum, value| Counter {
                        packets: sum.packets.wrapping_add(value.packets),
                        bytes: sum.bytes.wrapping_add(value.bytes),
                    });
                Ok((*reason, sum))
            })
            .collect()
    }

    /// How many entries a map has room for.
    ///
    /// # Errors
    /// If there is no such map.
    pub fn capacity(&self, name: &'static str) -> Result<u32, KernelError> {
        Ok(self.table(name)?.capacity())
    }
}

fn check_pinned(layout: &Layout, pin: &Path) -> Result<(), KernelError> {
    match MapInfo::from_pin(pin) {
        Ok(info) => layout.check(&info, true).map(drop),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        Err(error) => Err(map_error(layout.name, "open the pinned map", error)),
    }
}

fn load_object(
    object: &[u8],
    options: &LoadOptions,
    pins: &Pins,
    layouts: &BTreeMap<&'static str, Layout>,
) -> Result<Ebpf, KernelError> {
    let level = options.log_level.map_or(0_u8, level_number);
    let mut loader = EbpfLoader::new();
    loader
        .default_map_pin_directory(pins.maps())
        .override_global(LOG_LEVEL, &level, false);
    let constants = Constants::find(options.sockets);
    constants.patch(&mut loader);
    for layout in layouts.values() {
        loader
            .map_pin_path(layout.name, pins.map(layout.name))
            .map_max_entries(layout.name, layout.capacity.entries());
    }
    loader.load(object).map_err(load_error)
}

/// aya-log's numbers: 1 for errors to 5 for traces.
fn level_number(level: tracing::Level) -> u8 {
    match level {
        tracing::Level::ERROR => 1,
        tracing::Level::WARN => 2,
        tracing::Level::INFO => 3,
        tracing::Level::DEBUG => 4,
        tracing::Level::TRACE => 5,
    }
}

/// Opens a map that user space writes; none for the counters, which aya reads.
fn table(ebpf: &mut Ebpf, layout: &Layout, pins: &Pins) -> Result<Option<Table>, KernelError> {
    let map = ebpf.map(layout.name).ok_or_else(|| KernelError::Missing {
        what: "map",
        name: layout.name.to_owned(),
    })?;
    let pin = pins.map(layout.name);
    let info = MapInfo::from_pin(&pin)
        .map_err(|error| map_error(layout.name, "open the pinned map", error))?;
    // What aya opened may have been pinned between the first check and the load.
    let capacity = layout.check(&info, false)?;
    if layout.name == map::COUNTERS {
        return Ok(None);
    }
    let fd = map_data(map)
        .ok_or_else(|| KernelError::Missing {
            what: "map",
            name: layout.name.to_owned(),
        })?
        .fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| KernelError::map(layout.name, "open", capacity, source))?;
    Ok(Some(Table::new(
        layout.name,
        fd,
        layout.key,
        layout.value,
        capacity,
    )))
}

fn map_data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::LpmTrie(data)
        | Map::PerCpuArray(data) => Some(data),
        // The layout check has refused every other type.
        _ => None,
    }
}

/// Loads programs side by side: the verifier takes a second of CPU for all of them. One that is loaded
/// already is success.
pub(crate) fn load_programs(ebpf: &mut Ebpf, hooks: &[Hook]) -> Result<(), KernelError> {
    let mut found = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        if let Some(hook) = hooks.iter().find(|hook| hook.program() == name) {
            let program: &mut SchedClassifier = program
                .try_into()
                .map_err(|source| program_error(*hook, source))?;
            found.push((*hook, program));
        }
    }
    if let Some(hook) = hooks
        .iter()
        .find(|hook| found.iter().all(|(it, _)| it != *hook))
    {
        return Err(KernelError::Missing {
            what: "program",
            name: hook.program().to_owned(),
        });
    }
    thread::scope(|scope| {
        let load = |(hook, program): (Hook, &'_ mut SchedClassifier)| match program.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
            Err(source) => Err(program_error(hook, source)),
        };
        let threads: Vec<_> = found
            .into_iter()
            .map(|it| scope.spawn(move || load(it)))
            .collect();
        // All of them end with the scope, whatever the first says.
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

pub(crate) fn program_error(hook: Hook, error: ProgramError) -> KernelError {
    load_failure(hook.program(), error)
}

/// The error of a program that could not be loaded, with the end of the verifier's log.
pub(crate) fn load_failure(program: &str, error: ProgramError) -> KernelError {
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            if io_error.raw_os_error() == Some(libc::EPERM) && log.trim().is_empty() {
                return KernelError::NotPermitted {
                    action: format!("load the program {program}"),
                    source: io_error,
                };
            }
            let lines = log.lines().collect::<Vec<_>>();
            let tail = &lines[lines.len().saturating_sub(VERIFIER_LINES)..];
            KernelError::Verifier {
                program: program.to_owned(),
                log: tail.join("\n"),
                source: io_error,
            }
        }
        error => KernelError::Program {
            program: program.to_owned(),
            source: Box::new(error),
        },
    }
}

pub(crate) fn load_error(error: EbpfError) -> KernelError {
    match error {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => {
            KernelError::map(&name, "create", 0, io_error)
        }
        error => KernelError::Load(Box::new(error)),
    }
}

fn map_error(name: &str, action: &'static str, error: MapError) -> KernelError {
    let source = match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::IoError(error) => error,
        error => io::Error::other(error),
    };
    KernelError::map(name, action, 0, source)
}
