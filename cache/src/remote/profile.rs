//! AWS's profile files (`~/.aws/credentials`, `~/.aws/config`), read as its own tools do, as far
//! as they hold plain values. Knows no store.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A section: keys to values. Keys of a nested section (`s3 =` and lines below) are `s3.key`.
type Section = BTreeMap<String, String>;
type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// What the files say of one profile.
#[derive(Default)]
pub(super) struct Profile {
    pub name: String,
    values: Section,
    /// Of the profile's `services`, those of S3.
    endpoint: Option<String>,
}

/// Ways to get credentials that mean running programs or asking services.
const UNSUPPORTED: [&str; 5] =
    ["credential_process", "sso_session", "sso_start_url", "source_profile", "credential_source"];

impl Profile {
    /// The profile that the environment names, or `default`.
    ///
    /// # Errors
    /// Says in words when a file cannot be read, or when a profile that is named is in neither.
    pub fn read(env: Env<'_>) -> Result<Profile, String> {
        let text = |name: &str| env(name)?.into_string().ok().filter(|v| !v.is_empty());
        let named = text("AWS_PROFILE").or_else(|| text("AWS_DEFAULT_PROFILE"));
        let name = named.clone().unwrap_or_else(|| "default".to_string());
        let home = env("HOME").map(PathBuf::from);
        let file = |variable: &str, usual: &str| {
            let given = env(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
            given.or_else(|| Some(home.as_ref()?.join(usual)))
        };
        let credentials = sections(file("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials"))?;
        let config = sections(file("AWS_CONFIG_FILE", ".aws/config"))?;
        let heading = if name == "default" { name.clone() } else { format!("profile {name}") };
        let found = [config.get(&heading), credentials.get(&name)];
        if named.is_some() && found.iter().all(Option::is_none) {
            return Err(format!("there is no AWS profile `{name}`\nhint: see AWS_PROFILE"));
        }
        // What the credentials file says wins.
        let values: Section = found.into_iter().flatten().flatten().map(cloned).collect();
        let services = values.get("services").map(|name| format!("services {name}"));
        let services = services.and_then(|heading| config.get(&heading));
        let endpoint = services.and_then(|section| section.get("s3.endpoint_url")).cloned();
        Ok(Profile { name, values, endpoint })
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// Where S3 is, when the profile says so.
    pub fn endpoint(&self) -> Option<&str> {
        self.endpoint
            .as_deref()
            .or_else(|| self.get("s3.endpoint_url"))
            .or(self.get("endpoint_url"))
    }

    /// How it gets its credentials when that is none of our ways.
    pub fn unsupported(&self) -> Option<&'static str> {
        UNSUPPORTED.into_iter().find(|key| self.values.contains_key(*key))
    }
}

fn cloned((key, value): (&String, &String)) -> (String, String) {
    (key.clone(), value.clone())
}

/// The sections of a file; none when it is not there.
fn sections(path: Option<PathBuf>) -> Result<BTreeMap<String, Section>, String> {
    let Some(path) = path else { return Ok(BTreeMap::new()) };
    let shown = |path: &Path| path.display().to_string();
    match fs::read_to_string(&path) {
        Ok(text) => Ok(parse(&text)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(BTreeMap::new())
        }
        Err(e) => Err(format!("cannot read `{}`: {e}", shown(&path))),
    }
}

/// Lines that are no INI are passed over, as AWS's tools pass over what they do not know.
fn parse(text: &str) -> BTreeMap<String, Section> {
    let mut sections: BTreeMap<String, Section> = BTreeMap::new();
    let (mut heading, mut above) = (None, String::new());
    for line in text.lines() {
        let nested = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.split_once(']')) {
            let words: Vec<&str> = name.0.split_whitespace().collect();
            let name = words.join(" ");
            sections.entry(name.clone()).or_default();
            (heading, above) = (Some(name), String::new());
            continue;
        }
        let (Some(section), Some((key, value))) = (&heading, line.split_once('=')) else {
            continue;
        };
        // A comment after a value begins with a space and a sign.
        let value = value.split(" #").next().unwrap_or_default();
        let (key, value) = (key.trim().to_lowercase(), value.trim().to_string());
        let section = sections.entry(section.clone()).or_default();
        if nested && !above.is_empty() {
            section.insert(format!("{above}.{key}"), value);
        } else {
            above = if value.is_empty() { key.clone() } else { String::new() };
            section.insert(key, value);
        }
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_tools_of_aws_read_them() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".aws")).unwrap();
        let credentials = "[default]\naws_access_key_id = A\naws_secret_access_key=s=1 # mine\n\
                           [ work ]\n aws_access_key_id=W\n";
        fs::write(dir.path().join(".aws/credentials"), credentials).unwrap();
        let config = "; comment\n[default]\nregion = eu-west-1\naws_access_key_id = config\n\
                      s3 =\n  endpoint_url = http://nested\n  addressing_style = path\n\
                      [profile work]\nservices = lab\nendpoint_url = http://plain\n\
                      [services lab]\ns3 =\n  endpoint_url = http://lab\n\
                      [profile sso]\nsso_session = x\n";
        fs::write(dir.path().join(".aws/config"), config).unwrap();
        let home = dir.path().as_os_str().to_os_string();
        let with = |profile: Option<&'static str>| {
            let home = home.clone();
            Profile::read(&move |name| match name {
                "HOME" => Some(home.clone()),
                "AWS_PROFILE" => profile.map(OsString::from),
                _ => None,
            })
        };
        let default = with(None).unwrap();
        assert_eq!(default.get("aws_access_key_id"), Some("A"));
        assert_eq!(default.get("aws_secret_access_key"), Some("s=1"));
        assert_eq!(default.get("region"), Some("eu-west-1"));
        assert_eq!(default.endpoint(), Some("http://nested"));
        let work = with(Some("work")).unwrap();
        assert_eq!(work.get("aws_access_key_id"), Some("W"));
        assert_eq!((work.endpoint(), work.get("region")), (Some("http://lab"), None));
        assert_eq!(with(Some("sso")).unwrap().unsupported(), Some("sso_session"));
        let error = with(Some("none")).err().unwrap();
        assert!(error.contains("no AWS profile `none`"), "{error}");
        let nowhere = Profile::read(&|_| None).unwrap();
        assert_eq!((nowhere.name.as_str(), nowhere.get("region")), ("default", None));
    }
}
