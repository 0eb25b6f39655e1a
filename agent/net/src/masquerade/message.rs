//! Messages of nf_tables (linux/netfilter/nf_tables.h), as far as the masquerade needs them.
//!
//! A message is a netlink header, the family with two more bytes, and attributes: length and type of
//! two bytes each in the machine's order, then the value, padded to four bytes. Numbers within
//! values are in network order.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// `NFPROTO_INET`: tables for both families.
const INET: u8 = 1;
/// `NFNL_SUBSYS_NFTABLES`.
pub(super) const SUBSYSTEM: u8 = 10;
/// The chain.
const CHAIN: &str = "postrouting";
/// `NF_INET_POST_ROUTING`.
const HOOK: u32 = 4;
/// `NF_IP_PRI_NAT_SRC`.
const PRIORITY: u32 = 100;
/// `NFT_REG_1`, 16 bytes.
const REGISTER: u32 = 1;
/// `NFTA_LIST_ELEM`.
const ELEMENT: u16 = 1;
/// `NFTA_DATA_VALUE`.
const VALUE: u16 = 1;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;
/// Without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const TYPE: u16 = 0x3fff;

/// `enum nf_tables_msg_types`.
mod kind {
    pub(super) const NEW_TABLE: u8 = 0;
    pub(super) const GET_TABLE: u8 = 1;
    pub(super) const DEL_TABLE: u8 = 2;
    pub(super) const NEW_CHAIN: u8 = 3;
    pub(super) const NEW_RULE: u8 = 6;
    pub(super) const DEL_RULE: u8 = 8;
    pub(super) const NEW_SET: u8 = 9;
    pub(super) const NEW_SET_ELEM: u8 = 12;
    pub(super) const GET_SET_ELEM: u8 = 13;
    pub(super) const DEL_SET_ELEM: u8 = 14;
    pub(super) const GET_GEN: u8 = 16;
}

/// Flags of a message beside those that all have.
mod flag {
    /// `NLM_F_CREATE`.
    pub(super) const CREATE: u16 = 0x400;
    /// `NLM_F_APPEND`.
    pub(super) const APPEND: u16 = 0x800;
}

/// A message without its netlink header.
#[derive(Clone, Debug)]
pub(super) struct Message {
    /// Of nf_tables.
    pub(super) kind: u8,
    pub(super) flags: u16,
    pub(super) family: u8,
    pub(super) attributes: Attributes,
}

/// What differs between the families.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    set: &'static str,
    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    protocol: u8,
    /// nft's number of the type, so that it lists the set well.
    key_type: u32,
    /// Length of an address, and where the header has source and destination, bytes.
    length: u32,
    source: u32,
    destination: u32,
}

const V4: Family = Family {
    set: "pods4",
    protocol: 2,
    key_type: 7,
    length: 4,
    source: 12,
    destination: 16,
};
const V6: Family = Family {
    set: "pods6",
    protocol: 10,
    key_type: 8,
    length: 16,
    source: 8,
    destination: 24,
};

/// Both.
pub(super) fn families() -> [Family; 2] {
    [V4, V6]
}

impl Family {
    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { V4 } else { V6 }
    }

    /// Whether an address is of this family.
    pub(super) fn has(self, address: IpAddr) -> bool {
        Self::of(address).protocol == self.protocol
    }
}

/// A list of attributes in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub(super) fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    fn nested(self, kind: u16, inner: Self) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }

    /// A value within `struct nft_data`'s attributes.
    fn data(self, kind: u16, value: &[u8]) -> Self {
        self.nested(kind, Self::default().bytes(VALUE, value))
    }

    /// An expression of a rule.
    fn expression(self, name: &str, data: Self) -> Self {
        let expression = Self::default().text(1, name).nested(2, data);
        self.nested(ELEMENT, expression)
    }

    /// Goes on only with packets of a family.
    fn only(self, family: Family) -> Self {
        // NFT_META_NFPROTO
        let load = Self::default().number(1, REGISTER).number(2, 15);
        let compare = Self::default()
            .number(1, REGISTER)
            .number(2, 0)
            .data(3, &[family.protocol]);
        self.expression("meta", load).expression("cmp", compare)
    }

    /// Loads an address from the network header.
    fn load(self, family: Family, offset: u32) -> Self {
        let load = Self::default()
            .number(1, REGISTER)
            .number(2, 1)
            .number(3, offset)
            .number(4, family.length);
        self.expression("payload", load)
    }
}

impl Message {
    fn new(kind: u8, flags: u16, attributes: Attributes) -> Self {
        Self {
            kind,
            flags,
            family: INET,
            attributes,
        }
    }

    /// Makes the table; one that exists is success.
    pub(super) fn new_table(table: &str) -> Self {
        Self::new(
            kind::NEW_TABLE,
            flag::CREATE,
            Attributes::default().text(1, table),
        )
    }

    pub(super) fn get_table(table: &str) -> Self {
        Self::new(kind::GET_TABLE, 0, Attributes::default().text(1, table))
    }

    /// Removes the table with all that is in it.
    pub(super) fn delete_table(table: &str) -> Self {
        Self::new(kind::DEL_TABLE, 0, Attributes::default().text(1, table))
    }

    /// Makes the set of a family's Pods; one that exists is success.
    pub(super) fn new_set(table: &str, family: Family) -> Self {
        let attributes = Attributes::default()
            .text(1, table)
            .text(2, family.set)
            .number(3, 0)
            .number(4, family.key_type)
            .number(5, family.length)
            // Its number within the transaction.
            .number(10, family.protocol.into());
        Self::new(kind::NEW_SET, flag::CREATE, attributes)
    }

    /// Makes the chain; one that exists is success.
    pub(super) fn new_chain(table: &str) -> Self {
        let hook = Attributes::default().number(1, HOOK).number(2, PRIORITY);
        let attributes = Attributes::default()
            .text(1, table)
            .text(3, CHAIN)
            .nested(4, hook)
            .text(7, "nat");
        Self::new(kind::NEW_CHAIN, flag::CREATE, attributes)
    }

    /// Removes the chain's rules.
    pub(super) fn flush_chain(table: &str) -> Self {
        let attributes = Attributes::default().text(1, table).text(2, CHAIN);
        Self::new(kind::DEL_RULE, 0, attributes)
    }

    fn rule(table: &str, expressions: Attributes) -> Self {
        let attributes = Attributes::default()
            .text(1, table)
            .text(2, CHAIN)
            .nested(4, expressions);
        Self::new(kind::NEW_RULE, flag::CREATE | flag::APPEND, attributes)
    }

    /// What goes to a block ends here.
    pub(super) fn exempt(table: &str, family: Family, block: IpNet) -> Self {
        let mask = bytes(block.netmask());
        let bitwise = Attributes::default()
            .number(1, REGISTER)
            .number(2, REGISTER)
            .number(3, family.length)
            .data(4, &mask)
            .data(5, &vec![0; mask.len()]);
        let compare = Attributes::default()
            .number(1, REGISTER)
            .number(2, 0)
            .data(3, &bytes(block.network()));
        // NFT_REG_VERDICT, NFTA_DATA_VERDICT, NFT_RETURN
        let verdict = Attributes::default().bytes(1, &(-5_i32).to_be_bytes());
        let end = Attributes::default()
            .number(1, 0)
            .nested(2, Attributes::default().nested(2, verdict));
        let expressions = Attributes::default()
            .only(family)
            .load(family, family.destination)
            .expression("bitwise", bitwise)
            .expression("cmp", compare)
            .expression("immediate", end);
        Self::rule(table, expressions)
    }

    /// What comes from a Pod of the set gets the address of the interface that it leaves by.
    pub(super) fn masquerade(table: &str, family: Family) -> Self {
        let lookup = Attributes::default()
            .text(1, family.set)
            .number(2, REGISTER)
            .number(4, family.protocol.into());
        let expressions = Attributes::default()
            .only(family)
            .load(family, family.source)
            .expression("lookup", lookup)
            .expression("masq", Attributes::default());
        Self::rule(table, expressions)
    }

    fn element(kind: u8, flags: u16, table: &str, address: IpAddr) -> Self {
        let element = Attributes::default().data(1, &bytes(address));
        let attributes = Attributes::default()
            .text(1, table)
            .text(2, Family::of(address).set)
            .nested(3, Attributes::default().nested(ELEMENT, element));
        Self::new(kind, flags, attributes)
    }

    /// Adds a Pod; one that is there is success.
    pub(super) fn new_element(table: &str, address: IpAddr) -> Self {
        Self::element(kind::NEW_SET_ELEM, flag::CREATE, table, address)
    }

    pub(super) fn delete_element(table: &str, address: IpAddr) -> Self {
        Self::element(kind::DEL_SET_ELEM, 0, table, address)
    }

    /// Asks for all Pods of a family.
    pub(super) fn get_elements(table: &str, family: Family) -> Self {
        let attributes = Attributes::default().text(1, table).text(2, family.set);
        Self::new(kind::GET_SET_ELEM, 0, attributes)
    }

    /// Asks for the generation of the ruleset.
    pub(super) fn get_generation() -> Self {
        Self {
            family: 0,
            ..Self::new(kind::GET_GEN, 0, Attributes::default())
        }
    }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The attributes of a list, by type; it ends at the first that makes no sense.
fn parse(mut list: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let [a, b, c, d, ..] = *list {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(value) = list.get(4..length) else {
            break;
        };
        found.push((u16::from_ne_bytes([c, d]) & TYPE, value));
        list = list.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn find(list: &[u8], kind: u16) -> Option<&[u8]> {
    parse(list)
        .into_iter()
        .find_map(|(found, value)| (found == kind).then_some(value))
}

/// The addresses in the attributes of an answer to [`Message::get_elements`].
pub(super) fn elements(answer: &[u8]) -> Vec<IpAddr> {
    let address = |(_, element): (u16, &[u8])| {
        let value = find(find(element, 1)?, VALUE)?;
        match value.len() {
            4 => Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?))),
            16 => Some(IpAddr::V6(Ipv6Addr::from(
                <[u8; 16]>::try_from(value).ok()?,
            ))),
            _ => None,
        }
    };
    let list = find(answer, 3).unwrap_or_default();
    parse(list).into_iter().filter_map(address).collect()
}

/// The number in the attributes of an answer to [`Message::get_generation`].
pub(super) fn generation(answer: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(find(answer, 1)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let list = Attributes::default().text(1, "ab").number(2, 7);
        assert_eq!(list.0.len(), 8 + 8);
        assert_eq!(find(&list.0, 1), Some(&b"ab\0"[..]));
        assert_eq!(generation(&list.0), None);
        assert_eq!(find(&list.0, 2), Some(&[0, 0, 0, 7][..]));
        assert_eq!(find(&list.0, 3), None);
    }

    #[test]
    fn elements_are_those_that_were_written() {
        for address in ["10.1.2.3", "fd00::5"] {
            let address: IpAddr = address.parse().unwrap();
            let message = Message::new_element("t", address);
            assert_eq!(elements(&message.attributes.0), [address]);
        }
        // Whatever is cut off or too long ends the list and nothing else.
        let whole = Message::new_element("t", "10.1.2.3".parse().unwrap());
        for length in 0..whole.attributes.0.len() {
            elements(&whole.attributes.0[..length]);
        }
    }
}
