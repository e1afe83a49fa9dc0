//! Whether a remote does what is needed of it, by doing it: for people who set one up.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::digest::Digest;
use crate::remote::inner::{Inner, Length, Remote, Way};
use crate::remote::transport::{Fault, Put};
use crate::remote::{Trouble, layout};

/// What a probe found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probed {
    /// For writing, reading and removing one small object.
    pub elapsed: Duration,
    /// Whether "create only what is not there" is honoured. Where it is not, leases save less work;
    /// nothing gets wrong.
    pub conditional: bool,
}

impl Remote {
    /// Writes an object, reads it back, removes it.
    ///
    /// # Errors
    /// What went wrong. Also when the remote was left alone because of earlier failures, it is
    /// asked.
    pub fn probe(&self) -> Result<Probed, Trouble> {
        self.inner.reads.worked();
        self.inner.writes.worked();
        self.work(Way::Write, Length::Short, self.inner.probe())
    }
}

impl Inner {
    async fn probe(&self) -> Result<Probed, Trouble> {
        self.ready(true).await?;
        let start = Instant::now();
        let nonce = nonce();
        let (name, bytes) = (layout::probe(&nonce), Bytes::from(nonce.clone()));
        let fail = |fault| self.trouble(fault);
        self.twice(|| self.transport.put(&name, bytes.clone(), Put::Over)).await.map_err(fail)?;
        let read = self.read(&name, 1024).await.map_err(fail)?;
        if read.as_ref() != Some(&bytes) {
            return Err(self.unavailable("what was written is not what is read"));
        }
        self.twice(|| self.transport.delete(&name)).await.map_err(fail)?;
        let elapsed = start.elapsed();
        let conditional = self.conditional().await.map_err(fail)?;
        Ok(Probed { elapsed, conditional })
    }

    /// Whether a conditional put works; tried once.
    pub async fn conditional(&self) -> Result<bool, Fault> {
        let attempt = || async {
            let nonce = nonce();
            let name = layout::probe(&nonce);
            let put = |text: &'static str| {
                self.transport.put(&name, Bytes::from_static(text.as_bytes()), Put::New)
            };
            let first = put("1").await;
            let second = put("2").await;
            let read = self.read(&name, 1024).await;
            let _ = self.transport.delete(&name).await;
            match (first, second) {
                (Err(Fault::Down(why)), _) | (_, Err(Fault::Down(why))) => Err(Fault::Down(why)),
                (Ok(()), Err(Fault::Exists)) => Ok(read?.as_deref() == Some(b"1")),
                _ => Ok(false),
            }
        };
        self.conditional.get_or_try_init(attempt).await.copied()
    }
}

/// A word that nobody else takes, and that nobody guesses: 64 hexadecimal digits.
pub fn nonce() -> String {
    let mut random = [0; 16];
    let _ = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut random);
    Digest::of(&[&random[..], crate::layout::unique().as_bytes()].concat()).to_string()
}
