//! Which remote cache a command means: the flags, `$PIPE_REMOTE`, the user's configuration. And
//! `pipe cache keygen`, which makes a key to sign with.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use cache::remote::{Remote, SigningKey};
use engine::spec::user::Config;

use super::Wrong;
use crate::cli::{Keygen, OfRemote};
use crate::out;

/// The remote that is wanted, if one is. Nothing is sent yet.
pub fn open(of: &OfRemote) -> Result<Option<Remote>> {
    if of.no_remote {
        return Ok(None);
    }
    let config = config()?;
    let var = std::env::var("PIPE_REMOTE").ok().filter(|value| !value.is_empty());
    let wanted = of.remote.clone().or(var);
    let settings = config.remote(wanted.as_deref(), of.trust_remote).map_err(Wrong)?;
    let Some(settings) = settings else { return Ok(None) };
    let env = |name: &str| std::env::var_os(name);
    Remote::open(settings, &env).map(Some).map_err(|trouble| Wrong(trouble.to_string()).into())
}

/// The same, where there must be one.
pub fn must_open(of: &OfRemote) -> Result<Remote> {
    open(of)?.ok_or_else(|| {
        anyhow!(Wrong(
            "no remote is named\nhint: give `--remote s3://bucket/prefix` (or gs://, az://, a directory), set PIPE_REMOTE, or write `remote:` into the configuration".into()
        ))
    })
}

pub fn config() -> Result<Config> {
    match config_dir() {
        Some(dir) => Config::read(&dir.join("config.yaml")).map_err(|e| anyhow!(Wrong(e))),
        None => Ok(Config::default()),
    }
}

/// `$XDG_CONFIG_HOME/pipe`, else `~/.config/pipe`.
fn config_dir() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = var("XDG_CONFIG_HOME").or_else(|| Some(var("HOME")?.join(".config")))?;
    Some(base.join("pipe"))
}

pub fn keygen(args: Keygen) -> Result<ExitCode> {
    let path = match args.path {
        Some(path) => path,
        None => match config_dir() {
            Some(dir) => dir.join("signing.key"),
            None => bail!(Wrong("there is no place for the key\nhint: name a file".into())),
        },
    };
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir)?;
    }
    let key = SigningKey::generate(&path, &args.comment)?;
    out::line(key.public().to_string());
    out::message(format!(
        "the private key is {}; name it under `sign_with:`, and give the line above to those who shall believe you, for their `keys:`",
        path.display()
    ));
    Ok(ExitCode::SUCCESS)
}
