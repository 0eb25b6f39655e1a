//! What the policies of all APIs are made of: label selectors, address blocks, port numbers.

use hachi_policy::{Operator, Selector};
use ipnet::IpNet;
use serde_json::Value;

use super::{
    fields::{Fields, text},
    port,
};

/// A `LabelSelector`.
pub(super) fn selector(value: &Value) -> Result<Selector, String> {
    let fields = Fields::of(value, &["matchLabels", "matchExpressions"])?;
    let mut selector = Selector::everything();
    if let Some(labels) = fields.get("matchLabels") {
        let Value::Object(labels) = labels else {
            return Err("matchLabels is not an object".to_owned());
        };
        for (key, value) in labels {
            let value = text(value, &format!("the value of label {key:?}"))?;
            selector.add_label(key, value).map_err(|e| e.to_string())?;
        }
    }
    for term in fields.list("matchExpressions")?.unwrap_or_default() {
        let term = Fields::of(term, &["key", "operator", "values"])?;
        let values = term.list("values")?.unwrap_or_default();
        let values = values
            .iter()
            .map(|value| text(value, "a value").map(str::to_owned))
            .collect::<Result<Vec<_>, _>>()?;
        let operator = term.text("operator")?.unwrap_or_default();
        let operator = Operator::parse(operator).map_err(|e| e.to_string())?;
        let key = term.text("key")?.unwrap_or_default();
        selector
            .add(key, operator, values)
            .map_err(|e| e.to_string())?;
    }
    Ok(selector)
}

/// An address block.
pub(super) fn cidr(value: &Value) -> Result<IpNet, String> {
    let text = text(value, "an address block")?;
    text.parse()
        .map_err(|_| format!("{text:?} is not an address block: write address/prefix"))
}

/// A port number from 1 to 65535.
pub(super) fn number(number: i64) -> Result<u16, String> {
    i32::try_from(number)
        .ok()
        .and_then(port)
        .ok_or_else(|| format!("port {number} is not between 1 and 65535"))
}
