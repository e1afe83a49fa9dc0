//! A headless Chromium, spoken to through two pipes in its DevTools protocol.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A running browser.
pub struct Chromium {
    child: Child,
    to: File,
    from: BufReader<File>,
    next: u64,
    /// Messages that nobody asked for: errors, loads.
    events: Vec<Value>,
    _home: TempDir,
}

/// One open page.
pub struct Page<'a> {
    browser: &'a mut Chromium,
    session: String,
}

/// `PIPE_TEST_CHROMIUM`, else `chromium` on the path.
fn program() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("PIPE_TEST_CHROMIUM") {
        return Some(named.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("chromium")).find(|file| file.is_file())
}

impl Chromium {
    /// Starts one; `None` where there is none.
    pub fn start() -> Option<Chromium> {
        let program = program()?;
        let home = tempfile::tempdir().unwrap();
        let (to, from) = (home.path().join("to"), home.path().join("from"));
        let made = Command::new("mkfifo").args([&to, &from]).status().unwrap();
        assert!(made.success());
        // The protocol is on descriptors 3 and 4; a shell can put them there.
        let script = r#"exec "$0" "$@" 3<"$TO" 4>"$FROM""#;
        let child = Command::new("sh")
            .args(["-c", script])
            .arg(program)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-sync"])
            .args(["--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"])
            .arg("--remote-debugging-pipe")
            .arg(format!("--user-data-dir={}", home.path().join("data").display()))
            .envs([("TO", &to), ("FROM", &from)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Each opening waits for the other side, in the shell's order.
        let to = File::options().write(true).open(&to).unwrap();
        let from = BufReader::new(File::open(&from).unwrap());
        Some(Chromium { child, to, from, next: 0, events: Vec::new(), _home: home })
    }

    fn call(&mut self, session: Option<&str>, method: &str, params: Value) -> Value {
        self.next += 1;
        let mut message = json!({ "id": self.next, "method": method, "params": params });
        if let Some(session) = session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.to.write_all(&bytes).unwrap();
        loop {
            let answer = self.read();
            if answer["id"] == self.next {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push(answer);
        }
    }

    fn read(&mut self) -> Value {
        let mut bytes = Vec::new();
        self.from.read_until(0, &mut bytes).unwrap();
        assert_eq!(bytes.pop(), Some(0), "the browser is gone");
        serde_json::from_slice(&bytes).unwrap()
    }

    /// Opens `file` in a window of `width` by `height`, of a phone if it is narrow, and waits until it
    /// is loaded.
    pub fn open(&mut self, file: &Path, (width, height): (u32, u32), dark: bool) -> Page<'_> {
        let target = self.call(None, "Target.createTarget", json!({ "url": "about:blank" }));
        let target = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = self.call(None, "Target.attachToTarget", target);
        let session = attached["sessionId"].as_str().unwrap().to_string();
        let mut page = Page { browser: self, session };
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            page.call(domain, json!({}));
        }
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        page.call("Emulation.setDeviceMetricsOverride", size);
        let scheme =
            json!({ "name": "prefers-color-scheme", "value": if dark { "dark" } else { "light" } });
        page.call("Emulation.setEmulatedMedia", json!({ "features": [scheme] }));
        let url = format!("file://{}", file.display());
        page.call("Page.navigate", json!({ "url": url }));
        page.wait_for("Page.loadEventFired");
        page
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Page<'_> {
    fn call(&mut self, method: &str, params: Value) -> Value {
        self.browser.call(Some(&self.session), method, params)
    }

    /// Waits for the next event of that name, also one that came before.
    pub fn wait_for(&mut self, method: &str) {
        let ours = |event: &Value, session: &str| {
            event["method"] == method && event["sessionId"] == session
        };
        loop {
            let session = self.session.clone();
            if let Some(at) = self.browser.events.iter().position(|event| ours(event, &session)) {
                self.browser.events.remove(at);
                return;
            }
            let event = self.browser.read();
            self.browser.events.push(event);
        }
    }

    /// The value of a script's expression.
    pub fn value(&mut self, expression: &str) -> Value {
        let asked = json!({ "expression": expression, "returnByValue": true });
        let answer = self.call("Runtime.evaluate", asked);
        assert!(answer.get("exceptionDetails").is_none(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Presses, moves and lets go the mouse along `points`.
    pub fn drag(&mut self, points: &[(f64, f64)]) {
        for (i, (x, y)) in points.iter().enumerate() {
            let kinds: &[&str] = match i {
                0 => &["mouseMoved", "mousePressed"],
                i if i + 1 == points.len() => &["mouseMoved", "mouseReleased"],
                _ => &["mouseMoved"],
            };
            for kind in kinds {
                let held = i > 0 || *kind == "mousePressed";
                let event = json!({ "type": kind, "x": x, "y": y, "button": if held { "left" } else { "none" },
                    "buttons": u8::from(held), "clickCount": 1 });
                self.call("Input.dispatchMouseEvent", event);
            }
        }
    }

    /// Moves the mouse to a place.
    pub fn hover(&mut self, (x, y): (f64, f64)) {
        let event = json!({ "type": "mouseMoved", "x": x, "y": y });
        self.call("Input.dispatchMouseEvent", event);
    }

    /// A picture of the whole page, kept beside other output of tests.
    pub fn screenshot(&mut self, name: &str) -> PathBuf {
        let size = self.value("[innerWidth, document.documentElement.scrollHeight]");
        let clip = json!({ "x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1 });
        let asked = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let answer = self.call("Page.captureScreenshot", asked);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::write(&path, decode(answer["data"].as_str().unwrap())).unwrap();
        path
    }

    /// Errors of scripts, and what the page's policy refused.
    pub fn troubles(&mut self) -> Vec<String> {
        self.value("0"); // whatever was said before has come when this is answered
        let told = ["Runtime.exceptionThrown", "Log.entryAdded"];
        let ours = self.browser.events.iter().filter(|event| {
            event["sessionId"] == self.session.as_str()
                && told.iter().any(|method| event["method"] == *method)
        });
        ours.map(Value::to_string).collect()
    }
}

/// Base64, as the protocol has it: padded, without line breaks.
fn decode(text: &str) -> Vec<u8> {
    let (mut out, mut bits, mut held) = (Vec::with_capacity(text.len() * 3 / 4), 0u32, 0);
    for c in text.bytes() {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        (bits, held) = (bits << 6 | u32::from(six), held + 6);
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    out
}
