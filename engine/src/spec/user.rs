//! The user's own configuration: remote caches, whom to believe, with what to sign. One YAML file,
//! beside no pipeline; it never decides a result, so it is in no key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cache::remote::{PublicKey, Settings, SigningKey, Trust};
use serde::Deserialize;

/// `config.yaml` of the user.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Remote caches by name.
    pub remotes: BTreeMap<String, RemoteConfig>,
    /// The one that runs use without being told.
    pub remote: Option<String>,
    /// Lines of public keys whose entries are believed, of any remote.
    pub keys: Vec<String>,
    /// The private key that signs what is sent.
    pub sign_with: Option<PathBuf>,
    /// How this site's cluster is used; what a pipeline says goes before it.
    pub executor: BTreeMap<String, serde_json::Value>,
}

/// One remote cache.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteConfig {
    /// Where it is.
    pub url: String,
    /// Whether everybody who can write to it is believed.
    #[serde(default)]
    pub trusted: bool,
    /// More keys, for this one only.
    #[serde(default)]
    pub keys: Vec<String>,
}

impl Config {
    /// Reads the file at `path`; none is an empty one.
    ///
    /// # Errors
    /// In words, with the file's name and the place.
    pub fn read(path: &Path) -> Result<Config, String> {
        let text = match std::fs::read_to_string(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Config::default()),
            result => result.map_err(|e| format!("cannot read {}: {e}", path.display()))?,
        };
        Config::parse(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    fn parse(text: &str) -> Result<Config, String> {
        if text.lines().all(|line| line.trim_start().starts_with('#') || line.trim().is_empty()) {
            return Ok(Config::default());
        }
        serde_yaml::from_str(text).map_err(|e| e.to_string())
    }

    /// The remote that `wanted` (a name or a URL, else the default) means; `trust` believes its
    /// writers whatever the file says. `None` when none is wanted.
    ///
    /// # Errors
    /// Keys that are none, a signing key that cannot be read, a name that is not in the file.
    pub fn remote(&self, wanted: Option<&str>, trust: bool) -> Result<Option<Settings>, String> {
        let Some(wanted) = wanted.or(self.remote.as_deref()) else { return Ok(None) };
        let known = self
            .remotes
            .get(wanted)
            .or_else(|| self.remotes.values().find(|remote| remote.url == wanted));
        let url = match known {
            Some(remote) => remote.url.clone(),
            None if wanted.contains('/') => wanted.to_string(),
            None => {
                let names: Vec<&str> = self.remotes.keys().map(String::as_str).collect();
                return Err(format!(
                    "no remote `{wanted}` is configured{}\nhint: name one under `remotes:`, or give a URL such as s3://bucket/prefix or a directory such as ./shared",
                    match names.is_empty() {
                        true => String::new(),
                        false => format!("; there are {}", names.join(", ")),
                    }
                ));
            }
        };
        let mut settings = Settings::new(url);
        let own = known.map_or(&[][..], |remote| &remote.keys);
        let keys = self.keys.iter().chain(own).map(|line| {
            line.parse::<PublicKey>().map_err(|e| format!("`{line}` is no public key: {e}"))
        });
        settings.trust = match trust || known.is_some_and(|remote| remote.trusted) {
            true => Trust::Writers,
            false => Trust::Keys(keys.collect::<Result<_, _>>()?),
        };
        if let Some(path) = &self.sign_with {
            let key = SigningKey::read(path).map_err(|e| e.to_string())?;
            settings.sign_with = Some(key);
        }
        Ok(Some(settings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remotes_by_name_by_url_and_by_default() {
        let text = "remote: lab\nremotes:\n  lab: { url: s3://lab/pipe, trusted: true }\n  wide: { url: s3://wide/pipe }\n";
        let config = Config::parse(text).unwrap();
        let of = |wanted, trust| config.remote(wanted, trust).unwrap().unwrap();
        assert_eq!(
            (of(None, false).url, of(None, false).trust),
            ("s3://lab/pipe".into(), Trust::Writers)
        );
        assert_eq!(of(Some("wide"), false).trust, Trust::Keys(Vec::new()));
        assert_eq!(of(Some("wide"), true).trust, Trust::Writers);
        assert_eq!(of(Some("s3://lab/pipe"), false).trust, Trust::Writers);
        assert_eq!(of(Some("./dir"), false).trust, Trust::Keys(Vec::new()));
        let error = config.remote(Some("labb"), false).unwrap_err();
        assert!(error.contains("no remote `labb`") && error.contains("lab, wide"), "{error}");
    }

    #[test]
    fn mistakes_are_told() {
        assert!(
            Config::parse("remotes: { a: { url: x, trustd: true } }")
                .unwrap_err()
                .contains("trustd")
        );
        let config = Config::parse("keys: [nonsense]").unwrap();
        assert!(config.remote(Some("./d"), false).unwrap_err().contains("no public key"));
        assert!(Config::parse("# nothing yet\n").unwrap().remote(None, false).unwrap().is_none());
    }
}
