//! The words of ours in a published `config.json`: fields of [`Config`] that its format leaves
//! open, under the key `pipe`.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value};

use crate::models::config::Config;

/// The key.
pub const KEY: &str = "pipe";

/// Fields by name.
pub type Fields = Map<String, Value>;

/// What has to be added to `base`, the reading of what a format says, to get `config`. A field that
/// is not `open` in the format must be equal.
pub fn difference(base: &Config, config: &Config, open: &[&str]) -> Result<Fields> {
    let (base, config) = (fields(base)?, fields(config)?);
    let mut missing = Fields::new();
    for (name, value) in config {
        if base.get(&name) != Some(&value) {
            ensure!(
                open.contains(&name.as_str()),
                "no published format says that `{name}` is {value} (it would be read as {})",
                base.get(&name).unwrap_or(&Value::Null)
            );
            missing.insert(name, value);
        }
    }
    Ok(missing)
}

/// `base` with `added` fields; the result is checked.
pub fn extend(base: &Config, added: &Fields, open: &[&str]) -> Result<Config> {
    let mut all = fields(base)?;
    for (name, value) in added {
        ensure!(
            open.contains(&name.as_str()),
            "`{KEY}` says `{name}`, which the format itself says or which cannot be"
        );
        all.insert(name.clone(), value.clone());
    }
    let config: Config = serde_json::from_value(Value::Object(all))
        .with_context(|| format!("`{KEY}` cannot be read"))?;
    config.check()?;
    Ok(config)
}

fn fields(config: &Config) -> Result<Fields> {
    match serde_json::to_value(config)? {
        Value::Object(fields) => Ok(fields),
        _ => unreachable!("a struct is an object"),
    }
}
