//! Validation rules: as much of the Common Expression Language as the definitions of this project
//! use. `self` and its fields, texts, numbers and booleans; `!`, `&&`, `||` and comparisons; and the
//! functions `has`, `size` and `isCIDR`. Rules that use more do not parse.
//!
//! <https://kubernetes.io/docs/reference/using-api/cel/>

use std::cmp::Ordering;

use ipnet::IpNet;
use serde_json::Value;

/// A rule, as a tree.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rule {
    Literal(Value),
    Own,
    Field(Box<Self>, String),
    Call(Function, Box<Self>),
    Not(Box<Self>),
    Binary(Box<Self>, &'static str, Box<Self>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Has,
    Size,
    IsCidr,
}

/// Weakest first; those of a row bind alike.
const OPERATORS: [&[&str]; 3] = [&["||"], &["&&"], &["==", "!=", "<=", ">=", "<", ">"]];

/// Reads a rule; the error says what of it is not known here.
pub(super) fn parse(text: &str) -> Result<Rule, String> {
    let mut parser = Parser { rest: text };
    let rule = parser.binary(0)?;
    if parser.rest.trim().is_empty() {
        Ok(rule)
    } else {
        Err(parser.unknown())
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn unknown(&self) -> String {
        format!("this server does not know {:?} in rules", self.rest.trim())
    }

    fn take(&mut self, token: &str) -> bool {
        match self.rest.trim_start().strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.take(token) {
            Ok(())
        } else {
            Err(self.unknown())
        }
    }

    fn binary(&mut self, level: usize) -> Result<Rule, String> {
        let Some(operators) = OPERATORS.get(level) else {
            return self.unary();
        };
        let mut left = self.binary(level + 1)?;
        while let Some(operator) = operators.iter().find(|operator| self.take(operator)) {
            let right = self.binary(level + 1)?;
            left = Rule::Binary(Box::new(left), operator, Box::new(right));
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Rule, String> {
        if self.take("!") {
            return Ok(Rule::Not(Box::new(self.unary()?)));
        }
        let mut rule = self.primary()?;
        while self.take(".") {
            let name = self.word();
            let is_method = self.rest.starts_with('(');
            rule = match (name, is_method) {
                ("size", true) => {
                    self.expect("(")?;
                    self.expect(")")?;
                    Rule::Call(Function::Size, Box::new(rule))
                }
                ("", _) | (_, true) => {
                    return Err(format!("this server does not know {name:?} in rules"));
                }
                (name, false) => Rule::Field(Box::new(rule), name.to_owned()),
            };
        }
        Ok(rule)
    }

    fn primary(&mut self) -> Result<Rule, String> {
        if self.take("(") {
            let rule = self.binary(0)?;
            self.expect(")")?;
            return Ok(rule);
        }
        for quote in ["'", "\""] {
            if self.take(quote) {
                let (text, rest) = self.rest.split_once(quote).ok_or("a text has no end")?;
                self.rest = rest;
                return if text.contains('\\') {
                    Err("this server does not know escapes in rules".to_owned())
                } else {
                    Ok(Rule::Literal(text.into()))
                };
            }
        }
        let word = self.word();
        let function = match word {
            "self" => return Ok(Rule::Own),
            "true" | "false" => return Ok(Rule::Literal((word == "true").into())),
            "has" => Function::Has,
            "size" => Function::Size,
            "isCIDR" => Function::IsCidr,
            _ => {
                let number = word.parse::<i64>();
                let number = number.map(|number| Rule::Literal(number.into()));
                return number.map_err(|_| format!("this server does not know {word:?} in rules"));
            }
        };
        self.expect("(")?;
        let argument = self.binary(0)?;
        self.expect(")")?;
        if function == Function::Has && !matches!(argument, Rule::Field(..)) {
            return Err("has() takes a field".to_owned());
        }
        Ok(Rule::Call(function, Box::new(argument)))
    }

    fn word(&mut self) -> &'a str {
        let text = self.rest.trim_start();
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let length = text.find(|c: char| !is_part(c)).unwrap_or(text.len());
        let (word, rest) = text.split_at(length);
        self.rest = rest;
        word
    }
}

impl Rule {
    /// Whether the rule is true of a value. An error is a rule that cannot be asked of it, which is
    /// refused as well.
    pub(super) fn holds(&self, own: &Value) -> Result<bool, String> {
        match self.value(own)? {
            Value::Bool(holds) => Ok(holds),
            other => Err(format!("the rule evaluates to {other}, which is no bool")),
        }
    }

    fn value(&self, own: &Value) -> Result<Value, String> {
        Ok(match self {
            Self::Literal(value) => value.clone(),
            Self::Own => own.clone(),
            Self::Field(of, name) => {
                let value = of.value(own)?;
                let field = value.get(name).cloned();
                field.ok_or_else(|| format!("no such key: {name}"))?
            }
            Self::Call(Function::Has, argument) => argument.value(own).is_ok().into(),
            Self::Call(Function::Size, argument) => match argument.value(own)? {
                Value::String(text) => text.chars().count().into(),
                Value::Array(items) => items.len().into(),
                Value::Object(map) => map.len().into(),
                other => return Err(format!("{other} has no size")),
            },
            Self::Call(Function::IsCidr, argument) => match argument.value(own)? {
                Value::String(text) => is_cidr(&text).into(),
                other => return Err(format!("isCIDR() of {other}")),
            },
            Self::Not(rule) => (!rule.holds(own)?).into(),
            Self::Binary(left, "&&", right) => (left.holds(own)? && right.holds(own)?).into(),
            Self::Binary(left, "||", right) => (left.holds(own)? || right.holds(own)?).into(),
            Self::Binary(left, operator, right) => {
                compare(&left.value(own)?, operator, &right.value(own)?)?.into()
            }
        })
    }
}

/// IPv4-mapped IPv6 addresses are no address blocks there.
fn is_cidr(text: &str) -> bool {
    match text.parse::<IpNet>() {
        Ok(IpNet::V4(_)) => true,
        Ok(IpNet::V6(net)) => net.addr().to_ipv4_mapped().is_none(),
        Err(_) => false,
    }
}

fn compare(left: &Value, operator: &str, right: &Value) -> Result<bool, String> {
    let order = match (left, right) {
        (Value::Number(left), Value::Number(right)) => match (left.as_i64(), right.as_i64()) {
            (Some(left), Some(right)) => Some(left.cmp(&right)),
            _ => left.as_f64().partial_cmp(&right.as_f64()),
        },
        (Value::String(left), Value::String(right)) => Some(left.cmp(right)),
        _ => None,
    };
    match operator {
        "==" => return Ok(order.map_or(left == right, Ordering::is_eq)),
        "!=" => return Ok(order.map_or(left != right, Ordering::is_ne)),
        _ => {}
    }
    let order = order.ok_or_else(|| format!("{left} and {right} have no order"))?;
    Ok(match operator {
        "<" => order.is_lt(),
        "<=" => order.is_le(),
        ">" => order.is_gt(),
        _ => order.is_ge(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_hold_or_do_not() {
        let own = json!({"start": 5, "end": 7, "name": "ab", "list": [1], "on": true});
        for (rule, holds) in [
            ("self.start < self.end", true),
            ("self.start>=self.end", false),
            ("self.start == 5 && self.name == 'ab'", true),
            ("self.start == 6 || self.name != \"ab\"", false),
            ("!self.on", false),
            ("!(self.start > 5) && self.on", true),
            ("has(self.start) && !has(self.middle)", true),
            ("size(self.name) == 2 && self.list.size() == 1", true),
            ("!has(self.middle) || self.middle < 3", true),
            ("isCIDR('10.0.0.0/8') && isCIDR('2001:db8::/32')", true),
            ("isCIDR('10.0.0.0')", false),
            ("isCIDR('::ffff:10.0.0.0/104')", false),
        ] {
            let found = parse(rule).and_then(|rule| rule.holds(&own));
            assert_eq!(found, Ok(holds), "{rule}");
        }
    }

    #[test]
    fn what_is_not_known_is_no_rule() {
        for rule in [
            "",
            "self.all(x, x > 1)",
            "self.start +",
            "self.start < self.end ? true : false",
            "oldSelf.start == self.start",
            "has(self)",
            "isURL(self)",
            "'a\\'b' == self",
            "(self.start",
        ] {
            assert!(parse(rule).is_err(), "{rule}");
        }
        for rule in ["self.middle == 1", "self", "self < 1"] {
            assert!(parse(rule).unwrap().holds(&json!({})).is_err(), "{rule}");
        }
    }
}
