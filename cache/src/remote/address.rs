//! Where a remote is: its URL, read. Knows no credentials; a URL that holds some is refused, and
//! never shown.

use std::fmt;
use std::path::PathBuf;

/// A bucket and the prefix in it, or a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    Bucket { service: Service, bucket: String, prefix: String },
    Directory(PathBuf),
}

/// Who keeps a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    S3,
    Google,
    Azure,
}

impl Service {
    fn scheme(self) -> &'static str {
        match self {
            Service::S3 => "s3",
            Service::Google => "gs",
            Service::Azure => "az",
        }
    }
}

impl Address {
    /// Reads a URL or the path of a directory; the error says in words what is wrong.
    pub fn parse(url: &str) -> Result<Address, String> {
        if url.is_empty() || url.contains(char::is_control) {
            return Err("the URL of a remote is empty or not one line".to_string());
        }
        let Some((scheme, rest)) = url.split_once("://") else {
            return Ok(Address::Directory(PathBuf::from(url)));
        };
        if rest.split('/').next().unwrap_or_default().contains('@') {
            return Err("the URL of a remote may not name a user or a password\n\
                        hint: credentials come from the environment or from profile files"
                .to_string());
        }
        let service = match scheme {
            "s3" => Service::S3,
            "gs" => Service::Google,
            "az" => Service::Azure,
            "file" => {
                let path = rest.strip_prefix('/').map(|path| PathBuf::from(format!("/{path}")));
                return path
                    .map(Address::Directory)
                    .ok_or_else(|| "a `file` URL is `file:///` and an absolute path".to_string());
            }
            _ => {
                let shown: String = scheme.chars().take(20).collect();
                return Err(format!(
                    "remotes of the kind `{shown}` are not known\n\
                     hint: `s3://bucket/prefix`, `gs://…`, `az://…`, or a directory"
                ));
            }
        };
        if rest.contains(['?', '#']) {
            return Err("the URL of a remote may not have a query\n\
                        hint: credentials come from the environment or from profile files"
                .to_string());
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_end_matches('/');
        let good = |name: &str| {
            !matches!(name, "" | "." | "..")
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.=+,".contains(&b))
        };
        if !good(bucket) {
            return Err(format!("`{}://` is followed by the name of a bucket", service.scheme()));
        }
        if !prefix.is_empty() && !prefix.split('/').all(good) {
            return Err("the prefix of a remote is of letters, digits and `-_.=+,`, with single \
                        `/` between"
                .to_string());
        }
        let (bucket, prefix) = (bucket.to_string(), prefix.to_string());
        Ok(Address::Bucket { service, bucket, prefix })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Directory(path) => write!(f, "{}", path.display()),
            Address::Bucket { service, bucket, prefix } => {
                write!(f, "{}://{bucket}", service.scheme())?;
                if prefix.is_empty() { Ok(()) } else { write!(f, "/{prefix}") }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_and_shown() {
        for (url, shown) in [
            ("s3://b/p/q/", "s3://b/p/q"),
            ("s3://b", "s3://b"),
            ("gs://b/p", "gs://b/p"),
            ("az://c/p", "az://c/p"),
            ("file:///tmp/x", "/tmp/x"),
            ("/tmp/x", "/tmp/x"),
            ("shared/dir", "shared/dir"),
        ] {
            assert_eq!(Address::parse(url).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn refused_and_no_secret_repeated() {
        for url in [
            "",
            "s3://",
            "s3:///p",
            "s3://b//p",
            "s3://b/../p",
            "s3://key:hunter2secret@b/p",
            "s3://b/p?token=hunter2secret",
            "az://b/p#hunter2secret",
            "ftp://hunter2secret/x",
            "https://b.s3.amazonaws.com/p?X-Amz-Signature=hunter2secret",
            "file://host/x",
            "s3://b/p\nq",
            "s3://b/hunter2 secret",
        ] {
            let error = Address::parse(url).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
