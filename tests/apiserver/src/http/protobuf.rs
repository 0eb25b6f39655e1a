//! Request bodies in protobuf, which is what `kubectl create KIND` sends.
//!
//! The tables name the fields of the messages that such commands make; what a table does not name
//! is skipped. Answers are always JSON, which the same clients accept.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use crate::failure::Failure;

/// The content type of such bodies.
pub(super) const CONTENT_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// What a body begins with.
const MAGIC: &[u8] = b"k8s\0";

/// A message's fields: number, name in JSON, type.
type Message = &'static [(u64, &'static str, Type)];

/// The type of a field.
#[derive(Debug, Clone, Copy)]
enum Type {
    Text,
    Texts,
    Number,
    Flag,
    /// Seconds since 1970; only its presence matters, for the server sets all of them itself.
    Time,
    TextMap,
    BytesMap,
    /// A number or a name.
    Port,
    One(Message),
    Many(Message),
}

const OWNER: Message = &[
    (5, "apiVersion", Type::Text),
    (1, "kind", Type::Text),
    (3, "name", Type::Text),
    (4, "uid", Type::Text),
    (6, "controller", Type::Flag),
    (7, "blockOwnerDeletion", Type::Flag),
];

const META: Message = &[
    (1, "name", Type::Text),
    (2, "generateName", Type::Text),
    (3, "namespace", Type::Text),
    (5, "uid", Type::Text),
    (6, "resourceVersion", Type::Text),
    (8, "creationTimestamp", Type::Time),
    (11, "labels", Type::TextMap),
    (12, "annotations", Type::TextMap),
    (13, "ownerReferences", Type::Many(OWNER)),
    (14, "finalizers", Type::Texts),
];

const NAMESPACE: Message = &[
    (1, "metadata", Type::One(META)),
    (2, "spec", Type::One(&[(1, "finalizers", Type::Texts)])),
];

const SERVICE_PORT: Message = &[
    (1, "name", Type::Text),
    (2, "protocol", Type::Text),
    (3, "port", Type::Number),
    (4, "targetPort", Type::Port),
    (5, "nodePort", Type::Number),
    (6, "appProtocol", Type::Text),
];

const AFFINITY: Message = &[(
    1,
    "clientIP",
    Type::One(&[(1, "timeoutSeconds", Type::Number)]),
)];

const SERVICE_SPEC: Message = &[
    (1, "ports", Type::Many(SERVICE_PORT)),
    (2, "selector", Type::TextMap),
    (3, "clusterIP", Type::Text),
    (4, "type", Type::Text),
    (5, "externalIPs", Type::Texts),
    (7, "sessionAffinity", Type::Text),
    (8, "loadBalancerIP", Type::Text),
    (9, "loadBalancerSourceRanges", Type::Texts),
    (10, "externalName", Type::Text),
    (11, "externalTrafficPolicy", Type::Text),
    (12, "healthCheckNodePort", Type::Number),
    (13, "publishNotReadyAddresses", Type::Flag),
    (14, "sessionAffinityConfig", Type::One(AFFINITY)),
    (17, "ipFamilyPolicy", Type::Text),
    (18, "clusterIPs", Type::Texts),
    (19, "ipFamilies", Type::Texts),
    (20, "allocateLoadBalancerNodePorts", Type::Flag),
    (21, "loadBalancerClass", Type::Text),
    (22, "internalTrafficPolicy", Type::Text),
    (23, "trafficDistribution", Type::Text),
];

const SERVICE: Message = &[
    (1, "metadata", Type::One(META)),
    (2, "spec", Type::One(SERVICE_SPEC)),
];

const CONFIG_MAP: Message = &[
    (1, "metadata", Type::One(META)),
    (2, "data", Type::TextMap),
    (3, "binaryData", Type::BytesMap),
    (4, "immutable", Type::Flag),
];

const SERVICE_ACCOUNT: Message = &[(1, "metadata", Type::One(META))];

const DELETE_OPTIONS: Message = &[
    (1, "gracePeriodSeconds", Type::Number),
    (
        2,
        "preconditions",
        Type::One(&[(1, "uid", Type::Text), (2, "resourceVersion", Type::Text)]),
    ),
    (4, "propagationPolicy", Type::Text),
    (5, "dryRun", Type::Texts),
];

const EVICTION: Message = &[
    (1, "metadata", Type::One(META)),
    (2, "deleteOptions", Type::One(DELETE_OPTIONS)),
];

/// Around every object: its type, and its bytes.
const ENVELOPE: Message = &[(
    1,
    "typeMeta",
    Type::One(&[(1, "apiVersion", Type::Text), (2, "kind", Type::Text)]),
)];

/// Reads a body as the JSON that it stands for.
pub(super) fn decode(body: &[u8]) -> Result<Value, Failure> {
    let broken = || Failure::bad_request("the request's protobuf body cannot be read");
    let body = body.strip_prefix(MAGIC).ok_or_else(broken)?;
    let envelope = message(body, ENVELOPE).ok_or_else(broken)?;
    let about = &envelope["typeMeta"];
    let kind = about["kind"].as_str().unwrap_or_default();
    let fields = match kind {
        "Namespace" => NAMESPACE,
        "Service" => SERVICE,
        "ConfigMap" => CONFIG_MAP,
        "ServiceAccount" => SERVICE_ACCOUNT,
        "Eviction" => EVICTION,
        "DeleteOptions" => DELETE_OPTIONS,
        _ => {
            let what = format!("{CONTENT_TYPE} with the kind {kind:?}; send JSON");
            return Err(Failure::unsupported_media_type(&what));
        }
    };
    let raw = Fields(body).find_map(|field| match field {
        Some((2, Raw::Bytes(bytes))) => Some(bytes),
        _ => None,
    });
    let mut object = message(raw.unwrap_or_default(), fields).ok_or_else(broken)?;
    object["apiVersion"] = about["apiVersion"].clone();
    object["kind"] = json!(kind);
    Ok(object)
}

/// A field as it stands on the wire.
enum Raw<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message; `None` once if it is broken.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Raw<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Raw<'a>)> {
        let tag = self.varint()?;
        let raw = match tag & 7 {
            0 => Raw::Number(self.varint()?),
            1 => Raw::Bytes(self.take(8)?),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Raw::Bytes(self.take(length)?)
            }
            5 => Raw::Bytes(self.take(4)?),
            _ => return None,
        };
        Some((tag >> 3, raw))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

fn message(bytes: &[u8], fields: Message) -> Option<Value> {
    let mut map = Map::new();
    for field in Fields(bytes) {
        let (number, raw) = field?;
        let Some((_, name, kind)) = fields.iter().find(|(known, ..)| *known == number) else {
            continue;
        };
        match (kind, raw) {
            // Go writes the fields that are not set, too; in JSON they are left out.
            (Type::Text, Raw::Bytes([])) | (Type::Number, Raw::Number(0)) => {}
            (Type::Text, Raw::Bytes(bytes)) => {
                map.insert((*name).into(), json!(std::str::from_utf8(bytes).ok()?));
            }
            (Type::Number, Raw::Number(number)) => {
                map.insert((*name).into(), json!(number));
            }
            (Type::Flag, Raw::Number(number)) => {
                map.insert((*name).into(), json!(number != 0));
            }
            (Type::Port, Raw::Bytes(bytes)) => {
                map.insert((*name).into(), port(bytes)?);
            }
            (Type::One(fields), Raw::Bytes(bytes)) => {
                map.insert((*name).into(), message(bytes, fields)?);
            }
            (Type::Texts, Raw::Bytes(bytes)) => {
                push(&mut map, name, json!(std::str::from_utf8(bytes).ok()?));
            }
            (Type::Many(fields), Raw::Bytes(bytes)) => {
                push(&mut map, name, message(bytes, fields)?);
            }
            (Type::TextMap | Type::BytesMap, Raw::Bytes(bytes)) => {
                let (key, value) = entry(bytes)?;
                let value = match kind {
                    Type::BytesMap => STANDARD.encode(value),
                    _ => std::str::from_utf8(value).ok()?.to_owned(),
                };
                map.entry(*name).or_insert_with(|| json!({}))[key] = json!(value);
            }
            (Type::Time, Raw::Bytes(_)) => {}
            _ => return None,
        }
    }
    Some(Value::Object(map))
}

fn push(map: &mut Map<String, Value>, name: &str, item: Value) {
    if let Value::Array(list) = map.entry(name).or_insert_with(|| json!([])) {
        list.push(item);
    }
}

fn entry(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (mut key, mut value): (_, &[u8]) = (String::new(), &[]);
    for field in Fields(bytes) {
        match field? {
            (1, Raw::Bytes(bytes)) => key = String::from_utf8(bytes.to_vec()).ok()?,
            (2, Raw::Bytes(bytes)) => value = bytes,
            _ => {}
        }
    }
    Some((key, value))
}

fn port(bytes: &[u8]) -> Option<Value> {
    let (mut is_name, mut number, mut name) = (false, 0, "");
    for field in Fields(bytes) {
        match field? {
            (1, Raw::Number(kind)) => is_name = kind == 1,
            (2, Raw::Number(value)) => number = value,
            (3, Raw::Bytes(bytes)) => name = std::str::from_utf8(bytes).ok()?,
            _ => {}
        }
    }
    Some(if is_name { json!(name) } else { json!(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_read() {
        let meta = b"\x0a\x04demo\x12\x00\x5a\x0a\x0a\x04team\x12\x02ab\x42\x00";
        let mut raw = vec![0x0a, u8::try_from(meta.len()).unwrap()];
        raw.extend_from_slice(meta);
        raw.extend_from_slice(b"\x12\x00\x1a\x02\x0a\x00");
        let mut body = b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09Namespace\x12".to_vec();
        body.push(u8::try_from(raw.len()).unwrap());
        body.extend_from_slice(&raw);
        let expected = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": "demo", "labels": {"team": "ab"}},
            "spec": {},
        });
        assert_eq!(decode(&body).unwrap(), expected);
        // Cut anywhere, it is refused or lacks something, and nothing panics.
        for end in 0..body.len() {
            assert_ne!(decode(&body[..end]).ok(), Some(expected.clone()), "{end}");
        }
    }

    #[test]
    fn other_kinds_are_refused() {
        let failure = decode(b"k8s\0\x0a\x09\x0a\x02v1\x12\x03Job\x12\x00").unwrap_err();
        assert_eq!(failure.code, 415);
        assert_eq!(decode(b"json").unwrap_err().code, 400);
    }
}
