//! `ipam`: where addresses come from, and the Pod's routes.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use hachi_net::{PodRoute, Range, RangeSet, gateway_of};
use ipnet::IpNet;

use super::absolute_path;
use crate::{
    error::Error,
    fields::{Fields, elements},
};

const DATA_DIR: &str = "/var/lib/cni/hachi";
/// What `ipam.type` may say: it is the plugin itself that allocates, by host-local's rules.
const TYPES: [&str; 2] = ["hachi-cni", "host-local"];

/// The configuration of addresses and routes.
#[derive(Debug)]
pub(crate) struct Ipam {
    pub(crate) data_dir: PathBuf,
    /// One address of each set; empty: the agent's pool.
    pub(crate) sets: Vec<RangeSet>,
    /// Blocks that are never given out, also of the agent's pool.
    pub(crate) exclude: Vec<IpNet>,
    /// Empty: a default route for every family that the Pod has.
    pub(crate) routes: Vec<PodRoute>,
}

impl Ipam {
    pub(super) fn parse(fields: &mut Fields, at_run_time: Vec<RangeSet>) -> Result<Self, Error> {
        let mut ipam = Self {
            data_dir: Path::new(DATA_DIR).to_owned(),
            sets: at_run_time,
            exclude: Vec::new(),
            routes: Vec::new(),
        };
        let Some(mut fields) = fields.object("ipam")? else {
            return ipam.validated();
        };
        if let Some(kind) = fields.take::<String>("type")?
            && !TYPES.contains(&kind.as_str())
        {
            let why = format!(
                "{kind:?} is not possible; leave it out or say {:?}",
                TYPES[0]
            );
            return Err(Error::field("ipam.type", why));
        }
        if let Some(dir) = absolute_path(&mut fields, "dataDir")? {
            ipam.data_dir = dir;
        }
        ipam.exclude = blocks(&mut fields)?;
        ipam.sets.extend(single_range(&mut fields)?);
        ipam.sets.extend(range_sets(&mut fields, "ranges")?);
        ipam.routes = fields
            .objects("routes")?
            .into_iter()
            .map(route)
            .collect::<Result<_, _>>()?;
        fields.finish()?;
        ipam.validated()
    }

    /// The blocks that the addresses are of.
    pub(crate) fn subnets(&self) -> Vec<IpNet> {
        let ranges = self.sets.iter().flat_map(|set| &set.ranges);
        ranges.map(|range| range.subnet().trunc()).collect()
    }

    fn validated(mut self) -> Result<Self, Error> {
        for set in &mut self.sets {
            set.exclude.clone_from(&self.exclude);
        }
        let mut families = Vec::new();
        for set in &self.sets {
            let v4 = |range: &Range| range.subnet().addr().is_ipv4();
            let Some(family) = set.ranges.first().map(v4) else {
                return Err(Error::field("ipam.ranges", "a set without a range"));
            };
            if set.ranges.iter().any(|range| v4(range) != family) {
                return Err(Error::field(
                    "ipam.ranges",
                    "a set has ranges of both families",
                ));
            }
            if families.contains(&family) {
                let why = "two sets of one family; a Pod has one address of each";
                return Err(Error::field("ipam.ranges", why));
            }
            families.push(family);
            for (index, range) in set.ranges.iter().enumerate() {
                if let Some(other) = set.ranges[..index]
                    .iter()
                    .find(|other| other.overlaps(range))
                {
                    let why = format!("{} and {} overlap", other.subnet(), range.subnet());
                    return Err(Error::field("ipam.ranges", why));
                }
            }
        }
        Ok(self)
    }
}

/// A list of sets, each a list of ranges.
pub(super) fn range_sets(fields: &mut Fields, key: &str) -> Result<Vec<RangeSet>, Error> {
    let mut sets = Vec::new();
    for (path, set) in fields.list(key)? {
        let mut ranges = Vec::new();
        for (path, element) in elements(&path, set)? {
            let mut fields = Fields::new(&path, element)?;
            let found = range(&mut fields)?;
            fields.finish()?;
            ranges.push(found.ok_or_else(|| Error::field(&path, "subnet is missing"))?);
        }
        sets.push(RangeSet {
            ranges,
            exclude: Vec::new(),
        });
    }
    Ok(sets)
}

/// host-local's short form: one range in the object itself.
fn single_range(fields: &mut Fields) -> Result<Option<RangeSet>, Error> {
    Ok(range(fields)?.map(|range| RangeSet {
        ranges: vec![range],
        exclude: Vec::new(),
    }))
}

fn range(fields: &mut Fields) -> Result<Option<Range>, Error> {
    let subnet: Option<IpNet> = fields.take("subnet")?;
    let start: Option<IpAddr> = fields.take("rangeStart")?;
    let end: Option<IpAddr> = fields.take("rangeEnd")?;
    let gateway: Option<IpAddr> = fields.take("gateway")?;
    let name = fields.name("subnet");
    match subnet {
        Some(subnet) => Range::new(subnet, start, end, gateway)
            .map(Some)
            .map_err(|e| Error::field(&name, e)),
        None if start.or(end).or(gateway).is_some() => Err(Error::field(&name, "missing")),
        None => Ok(None),
    }
}

fn blocks(fields: &mut Fields) -> Result<Vec<IpNet>, Error> {
    let mut blocks = Vec::new();
    for (path, value) in fields.list("exclude")? {
        let text = value.as_str().unwrap_or_default();
        let block = text
            .parse()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        let block: IpNet = block
            .map_err(|_| Error::field(&path, format_args!("{value} is no address or block")))?;
        blocks.push(block.trunc());
    }
    Ok(blocks)
}

fn route(mut fields: Fields) -> Result<PodRoute, Error> {
    let dst: IpNet = super::required(&mut fields, "dst")?;
    let gateway: Option<IpAddr> = fields.take("gw")?;
    if gateway.is_some_and(|gateway| gateway != gateway_of(dst.addr())) {
        let why = format!(
            "the only gateway is {}; leave it out",
            gateway_of(dst.addr())
        );
        return Err(Error::field(&fields.name("gw"), why));
    }
    if fields.take::<u8>("scope")?.is_some_and(|scope| scope != 0) {
        return Err(Error::field(
            &fields.name("scope"),
            "routes go through a gateway: 0 or nothing",
        ));
    }
    let route = PodRoute {
        dst: dst.trunc(),
        mtu: fields.take("mtu")?,
        advmss: fields.take("advmss")?,
        priority: fields.take("priority")?,
        table: fields.take("table")?,
    };
    fields.finish()?;
    Ok(route)
}
