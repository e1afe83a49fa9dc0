//! Where the hub is and where its files are kept, from the same variables as Hugging Face's own
//! library. Reads no environment itself: whoever does passes a function.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use ureq::tls::{PemItem, RootCerts, parse_pem};

use super::Error;

/// How the hub is reached.
#[derive(Clone)]
pub struct Settings {
    /// `https://huggingface.co`, without a slash at the end.
    pub endpoint: String,
    /// The cache that all tools share.
    pub cache: PathBuf,
    /// Sent to the endpoint and to nobody else.
    pub token: Option<String>,
    /// Certificates to trust instead of Mozilla's list: of a proxy that looks into TLS, say.
    pub roots: Option<PathBuf>,
    /// Ask nobody.
    pub offline: bool,
    /// How often something is tried in all.
    pub tries: u32,
    /// The first pause between two tries; each is twice the one before.
    pub pause: Duration,
    /// How long to wait for a connection, and for the next bytes.
    pub patience: Duration,
}

impl Settings {
    /// Settings for a hub and a cache, without a token.
    pub fn new(endpoint: impl Into<String>, cache: impl Into<PathBuf>) -> Settings {
        Settings {
            endpoint: endpoint.into(),
            cache: cache.into(),
            token: None,
            roots: None,
            offline: false,
            tries: 5,
            pause: Duration::from_secs(1),
            patience: Duration::from_secs(30),
        }
    }

    /// What the variables say: `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HOME`,
    /// `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`, `SSL_CERT_FILE`,
    /// `REQUESTS_CA_BUNDLE`.
    pub fn from_env(var: &dyn Fn(&str) -> Option<OsString>) -> Settings {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| var(name).and_then(|value| value.into_string().ok());
        let home = || var("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from);
        let path = |name: &str| {
            let path = PathBuf::from(var(name)?);
            Some(path.strip_prefix("~").map_or(path.clone(), |rest| home().join(rest)))
        };
        let caches = path("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache"));
        let hf = path("HF_HOME").unwrap_or_else(|| caches.join("huggingface"));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let saved = || {
            let place = path("HF_TOKEN_PATH").unwrap_or_else(|| hf.join("token"));
            std::fs::read_to_string(place).ok()
        };
        let token = text("HF_TOKEN").or_else(saved).map(|token| token.trim().to_string());
        let offline = text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE"));
        let yes = |value: String| {
            matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
        };
        Settings {
            token: token.filter(|token| !token.is_empty()),
            roots: path("SSL_CERT_FILE").or_else(|| path("REQUESTS_CA_BUNDLE")),
            offline: offline.is_some_and(yes),
            ..Settings::new(endpoint.trim_end_matches('/'), cache.unwrap_or_else(|| hf.join("hub")))
        }
    }
}

impl Settings {
    /// The certificates to trust.
    pub(super) fn trusted(&self) -> Result<RootCerts, Error> {
        let Some(path) = &self.roots else { return Ok(RootCerts::WebPki) };
        let no = |what: &dyn fmt::Display| {
            let path = path.display();
            Error::here(format!("no certificates in `{path}`: {what}\nhint: look at SSL_CERT_FILE"))
        };
        let text = std::fs::read(path).map_err(|e| no(&e))?;
        // What is no certificate between others is left out, as other tools do.
        let found = parse_pem(&text).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        let found: Vec<_> = found.collect();
        match found.is_empty() {
            true => Err(no(&"it is no list in PEM form")),
            false => Ok(RootCerts::new_with_certs(&found)),
        }
    }
}

/// Without the token, which must reach no log.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vars: &[(&str, &str)]) -> Settings {
        Settings::from_env(&|name| {
            vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn variables_mean_what_they_mean_elsewhere() {
        let cache = |vars: &[(&str, &str)]| of(vars).cache.display().to_string();
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        let xdg = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x")];
        assert_eq!(cache(&xdg), "/x/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/f")]), "/h/f/hub");
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), "/c");
        assert_eq!(of(&[("HF_ENDPOINT", "http://m:1/")]).endpoint, "http://m:1");
        assert_eq!(of(&[("HF_ENDPOINT", "")]).endpoint, "https://huggingface.co");
        for (value, offline) in [("1", true), ("true", true), ("0", false), ("", false)] {
            assert_eq!(of(&[("HF_HUB_OFFLINE", value)]).offline, offline);
            assert_eq!(of(&[("TRANSFORMERS_OFFLINE", value)]).offline, offline);
        }
    }

    #[test]
    fn a_token_comes_from_the_variable_or_the_file_and_is_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "saved\n").unwrap();
        let home = dir.path().to_str().unwrap();
        assert_eq!(of(&[("HF_HOME", home)]).token.as_deref(), Some("saved"));
        let both = of(&[("HF_HOME", home), ("HF_TOKEN", " secret ")]);
        assert_eq!(both.token.as_deref(), Some("secret"));
        assert!(!format!("{both:?}").contains("secret"));
    }
}
