//! Reads the eBPF object: where its programs are, and how much stack each takes.
//!
//! The verifier does not report stack depth after a success, but its rule is a property of the
//! code alone: per function the deepest access below the frame pointer, rounded up to 32 bytes, summed
//! up along the deepest chain of calls, at most 512.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// An instruction's length.
const INSTRUCTION: usize = 8;
/// Of an instruction: `call`.
const CALL: u8 = 0x85;
/// A function's frame is rounded up to this.
const ROUND: u32 = 32;

/// By program, the start and the length of its code in the file.
pub(crate) type Places = BTreeMap<String, (usize, usize)>;

/// A function in the object.
#[derive(Clone, Debug)]
struct Function {
    name: String,
    section: usize,
    /// In its section.
    start: usize,
    length: usize,
    /// In the file.
    place: usize,
    /// An entry point: outside `.text`, where the functions that programs call are.
    program: bool,
}

/// The object's programs.
pub(crate) fn programs(object: &[u8]) -> Result<Places> {
    let functions = Elf::parse(object)?.functions()?;
    Ok(functions
        .into_iter()
        .filter(|function| function.program)
        .map(|function| (function.name, (function.place, function.length)))
        .collect())
}

/// The stack that each program takes, with all that it calls.
pub(crate) fn stacks(object: &[u8]) -> Result<BTreeMap<String, u32>> {
    let elf = Elf::parse(object)?;
    let functions = elf.functions()?;
    functions
        .iter()
        .filter(|function| function.program)
        .map(|function| Ok((function.name.clone(), elf.stack(function, &functions, 0)?)))
        .collect()
}

struct Section {
    name: String,
    kind: u32,
    executable: bool,
    offset: usize,
    size: usize,
    /// The section that relocations apply to.
    info: usize,
    link: usize,
}

struct Elf<'a> {
    bytes: &'a [u8],
    sections: Vec<Section>,
}

impl<'a> Elf<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        if !bytes.starts_with(b"\x7fELF\x02\x01") {
            bail!("the eBPF object is no little-endian 64-bit ELF file");
        }
        let table = number(bytes, 0x28, 8)?;
        let (size, count) = (number(bytes, 0x3a, 2)?, number(bytes, 0x3c, 2)?);
        let names = number(bytes, 0x3e, 2)?;
        let field = |index: usize, at: usize, length: usize| {
            number(bytes, table + index * size + at, length)
        };
        let names_offset = field(names, 0x18, 8)?;
        let sections = (0..count).map(|index| {
            Ok(Section {
                name: string(bytes, names_offset + field(index, 0, 4)?)?,
                kind: u32::try_from(field(index, 4, 4)?)?,
                executable: field(index, 8, 8)? & 4 != 0,
                offset: field(index, 0x18, 8)?,
                size: field(index, 0x20, 8)?,
                link: field(index, 0x28, 4)?,
                info: field(index, 0x2c, 4)?,
            })
        });
        Ok(Self {
            bytes,
            sections: sections.collect::<Result<_>>()?,
        })
    }

    /// (name, type, section, value, size) of a symbol.
    fn symbol(&self, index: usize) -> Result<(String, u8, usize, usize, usize)> {
        const SYMTAB: u32 = 2;
        let table = self
            .sections
            .iter()
            .find(|s| s.kind == SYMTAB)
            .context("no symbol table")?;
        let at = table.offset + index * 24;
        if index * 24 >= table.size {
            bail!("there is no symbol {index}");
        }
        let strings = self
            .sections
            .get(table.link)
            .context("no string table")?
            .offset;
        let name = string(self.bytes, strings + number(self.bytes, at, 4)?)?;
        let kind = self.bytes[at + 4] & 15;
        let field = |offset: usize, length: usize| number(self.bytes, at + offset, length);
        Ok((name, kind, field(6, 2)?, field(8, 8)?, field(16, 8)?))
    }

    fn functions(&self) -> Result<Vec<Function>> {
        const FUNCTION: u8 = 2;
        let mut found = Vec::new();
        let mut index = 1;
        while let Ok((name, kind, section, start, length)) = self.symbol(index) {
            index += 1;
            let Some(home) = self.sections.get(section).filter(|home| home.executable) else {
                continue;
            };
            if kind == FUNCTION {
                let (place, program) = (home.offset + start, home.name != ".text");
                found.push(Function {
                    name,
                    section,
                    start,
                    length,
                    place,
                    program,
                });
            }
        }
        Ok(found)
    }

    /// The functions' symbols that call instructions refer to, by (section, place in it).
    fn target(&self, section: usize, place: usize, immediate: i32) -> Result<(usize, usize)> {
        const REL: u32 = 9;
        let relative = usize::try_from(i64::from(immediate + 1) * INSTRUCTION as i64);
        for table in self
            .sections
            .iter()
            .filter(|s| s.kind == REL && s.info == section)
        {
            for at in (table.offset..table.offset + table.size).step_by(16) {
                if number(self.bytes, at, 8)? != place {
                    continue;
                }
                let (_, _, home, value, _) = self.symbol(number(self.bytes, at + 12, 4)?)?;
                return Ok((
                    home,
                    value + relative.context("a call before a function's start")?,
                ));
            }
        }
        let next = i64::try_from(place)? + i64::from(immediate + 1) * INSTRUCTION as i64;
        Ok((section, usize::try_from(next)?))
    }

    fn stack(&self, function: &Function, all: &[Function], depth: u32) -> Result<u32> {
        const DEEPEST: u32 = 8;
        if depth > DEEPEST {
            bail!("{} calls deeper than the kernel allows", function.name);
        }
        let code = self
            .bytes
            .get(function.place..function.place + function.length)
            .with_context(|| format!("{} is cut short", function.name))?;
        let mut called = 0;
        for (index, instruction) in code.chunks_exact(INSTRUCTION).enumerate() {
            let pseudo_call = instruction[0] == CALL && instruction[1] >> 4 == 1;
            if !pseudo_call {
                continue;
            }
            let place = function.start + index * INSTRUCTION;
            let (section, start) = self.target(function.section, place, immediate(instruction))?;
            let callee = all
                .iter()
                .find(|other| other.section == section && other.start == start)
                .with_context(|| format!("{} calls what is no function", function.name))?;
            called = called.max(self.stack(callee, all, depth + 1)?);
        }
        Ok(frame(code).max(1).next_multiple_of(ROUND) + called)
    }
}

/// The deepest access below the frame pointer: directly, or through a copy of the pointer to
/// which a negative number was added.
fn frame(code: &[u8]) -> u32 {
    const FRAME_POINTER: u8 = 10;
    const MOVE: u8 = 0xbf;
    const ADD_IMMEDIATE: u8 = 0x07;
    let mut deepest = 0;
    let mut copies = [false; 11];
    for instruction in code.chunks_exact(INSTRUCTION) {
        let [code, registers, low, high, ..] = *instruction else {
            continue;
        };
        let (destination, source) = (registers & 15, registers >> 4);
        let offset = i32::from(i16::from_le_bytes([low, high]));
        let base = match code & 7 {
            1 => Some(source),
            2 | 3 => Some(destination),
            _ => None,
        };
        if base == Some(FRAME_POINTER) {
            deepest = deepest.min(offset);
        }
        let index = usize::from(destination);
        if index >= copies.len() {
            continue;
        }
        if code == ADD_IMMEDIATE && copies[index] {
            deepest = deepest.min(immediate(instruction));
        }
        // Any write of the register ends the copy: loads and arithmetic.
        if matches!(code & 7, 0 | 1 | 4 | 7) {
            copies[index] = code == MOVE && source == FRAME_POINTER;
        }
    }
    deepest.unsigned_abs()
}

fn immediate(instruction: &[u8]) -> i32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&instruction[4..8]);
    i32::from_le_bytes(bytes)
}

fn number(bytes: &[u8], at: usize, length: usize) -> Result<usize> {
    let slice = bytes
        .get(at..at + length)
        .context("the eBPF object is cut short")?;
    let mut wide = [0; 8];
    wide[..length].copy_from_slice(slice);
    usize::try_from(u64::from_le_bytes(wide)).context("a number does not fit")
}

fn string(bytes: &[u8], at: usize) -> Result<String> {
    let rest = bytes.get(at..).context("the eBPF object is cut short")?;
    let end = rest
        .iter()
        .position(|byte| *byte == 0)
        .context("a string does not end")?;
    Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(code: u8, destination: u8, source: u8, offset: i16, value: i32) -> [u8; 8] {
        let mut bytes = [code, source << 4 | destination, 0, 0, 0, 0, 0, 0];
        bytes[2..4].copy_from_slice(&offset.to_le_bytes());
        bytes[4..8].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    #[test]
    fn the_deepest_access_is_the_frame() {
        let direct = [
            // *(u64 *)(r10 - 24) = r1; r0 = *(u32 *)(r10 - 40); r1 = *(u32 *)(r2 - 100)
            instruction(0x7b, 10, 1, -24, 0),
            instruction(0x61, 0, 10, -40, 0),
            instruction(0x61, 1, 2, -100, 0),
        ];
        assert_eq!(frame(&direct.concat()), 40);
        let copied = [
            // r2 = r10; r3 = 1; r2 += -64; r4 = r10; r4 = r1; r4 += -200
            instruction(0xbf, 2, 10, 0, 0),
            instruction(0xb7, 3, 0, 0, 1),
            instruction(0x07, 2, 0, 0, -64),
            instruction(0xbf, 4, 10, 0, 0),
            instruction(0xbf, 4, 1, 0, 0),
            instruction(0x07, 4, 0, 0, -200),
        ];
        assert_eq!(frame(&copied.concat()), 64);
        assert_eq!(frame(&instruction(0x95, 0, 0, 0, 0)), 0);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        assert!(programs(b"").is_err());
        assert!(stacks(b"\x7fELF\x02\x01").is_err());
    }
}
