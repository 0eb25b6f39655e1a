//! Whether a kernel is configured as `docs/KERNELS.md` asks: the table that operators read is the one
//! that is checked.

use std::collections::BTreeMap;

use anyhow::Result;

use super::page;

/// The table's name on the page.
const OPTIONS: &str = "option";

/// A kernel's configuration: by option, without `CONFIG_`, how it is set.
#[derive(Debug)]
pub(crate) struct Config(BTreeMap<String, String>);

impl Config {
    /// Reads the file that a distribution installs beside the kernel.
    pub(crate) fn parse(text: &str) -> Self {
        let set = text.lines().filter_map(|line| {
            let (option, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            Some((option.to_owned(), value.to_owned()))
        });
        Self(set.collect())
    }

    /// Those of the page's options that are neither built in nor modules here.
    pub(crate) fn lacks(&self, page: &str) -> Result<Vec<String>> {
        let table = page::read(page, OPTIONS)?;
        let rows = table.values().flat_map(BTreeMap::keys);
        let mut options: Vec<&str> = rows
            .flat_map(|row| row.split(','))
            .map(|option| option.trim().trim_matches('`'))
            .collect();
        options.sort_unstable();
        options.dedup();
        anyhow::ensure!(!options.is_empty(), "the page names no option");
        let set = |option: &str| matches!(self.0.get(option).map(String::as_str), Some("y" | "m"));
        Ok(options
            .into_iter()
            .filter(|option| !set(option))
            .map(str::to_owned)
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_page_asks_for_and_a_kernel_lacks_is_found() -> Result<()> {
        let page = "<!-- option: begin -->\n\n| option | for |\n|---|---|\n\
            | `BPF_SYSCALL`, `BPF_JIT` | programs |\n| `VETH` | Pods |\n| `IPV6` | IPv6 |\n\n\
            <!-- option: end -->\n";
        let config = Config::parse(
            "# Linux\nCONFIG_BPF_SYSCALL=y\nCONFIG_VETH=m\n# CONFIG_IPV6 is not set\n\
             CONFIG_VERSION=\"x=y\"\n",
        );
        assert_eq!(config.lacks(page)?, ["BPF_JIT", "IPV6"]);
        assert!(config.lacks("no table").is_err());
        Ok(())
    }
}
