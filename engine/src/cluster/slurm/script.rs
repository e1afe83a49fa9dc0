//! The text of a job's script and the arguments of `sbatch`. Pure.

use std::path::Path;

use crate::cluster::batch::{Array, Shape};
use crate::cluster::settings::Settings;

/// Ends what a job reads; no line of it is this.
const END: &str = "end of input";

/// The script of an array: `command` becomes the job's own process, so that signals of the batch
/// system reach it and nobody else. It reads `input`, if that is anything.
pub fn script(setup: &[String], command: &[String], input: &str) -> String {
    let mut text = String::from("#!/bin/bash\n");
    for line in setup {
        text.push_str(line);
        text.push('\n');
    }
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    text.push_str("exec ");
    text.push_str(&words.join(" "));
    if !input.is_empty() {
        text.push_str(&format!(" <<'{END}'\n{input}{END}"));
    }
    text.push('\n');
    text
}

/// For a shell.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-=:,@%+".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// Arguments of `sbatch` for `array`.
pub(super) fn arguments(settings: &Settings, array: &Array) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |text: String| args.push(text);
    add("--parsable".into());
    add(format!("--job-name={}", array.name));
    let output = pattern(&array.output);
    if array.count > 1 {
        add(format!("--array=0-{}", array.count - 1));
        add(format!("--output={output}-%a.out"));
    } else {
        add(format!("--output={output}-0.out"));
    }
    add("--open-mode=append".into());
    add("--export=ALL".into());
    // What is lost is submitted anew, as another attempt: Slurm never starts one twice.
    add("--no-requeue".into());
    add("--nodes=1".into());
    add("--ntasks=1".into());
    takes(&array.shape, &mut add);
    if array.margin_s > 0 {
        add(format!("--signal=B:USR1@{}", array.margin_s.min(65535)));
    }
    if !array.exclude.is_empty() {
        add(format!("--exclude={}", array.exclude.join(",")));
    }
    named(settings, &mut add);
    settings.extra.iter().for_each(|extra| add(extra.clone()));
    add(array.script.display().to_string());
    args
}

/// A path in which Slurm replaces nothing.
fn pattern(path: &Path) -> String {
    path.display().to_string().replace('%', "%%")
}

/// Whose jobs they are.
fn named(settings: &Settings, add: &mut impl FnMut(String)) {
    let fields = [
        ("partition", &settings.partition),
        ("account", &settings.account),
        ("qos", &settings.qos),
    ];
    for (name, value) in fields {
        if let Some(value) = value {
            add(format!("--{name}={value}"));
        }
    }
}

fn takes(shape: &Shape, add: &mut impl FnMut(String)) {
    add(format!("--cpus-per-task={}", shape.cpus.max(1)));
    if shape.gpus > 0 {
        add(match &shape.gpu_type {
            Some(kind) => format!("--gres=gpu:{kind}:{}", shape.gpus),
            None => format!("--gres=gpu:{}", shape.gpus),
        });
    }
    if shape.memory > 0 {
        add(format!("--mem={}M", shape.memory.div_ceil(1 << 20)));
    }
    if let Some(seconds) = shape.time_s {
        // Slurm counts minutes.
        add(format!("--time={}", seconds.div_ceil(60).max(1)));
    }
}

/// Arguments of `sbatch` for a job that no leader looks after.
pub(crate) fn steps(settings: &Settings, name: &str, shape: &Shape) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |text: String| args.push(text);
    add("--parsable".into());
    add(format!("--job-name={name}"));
    add("--nodes=1".into());
    add("--ntasks=1".into());
    takes(shape, &mut add);
    named(settings, &mut add);
    settings.extra.iter().for_each(|extra| add(extra.clone()));
    args
}

/// Arguments of `sbatch` for the leader's own job, which writes to `<name>-<id>.log` in `dir`. It may
/// be started again: it goes on then.
pub fn leader(settings: &Settings, name: &str, dir: &Path, script: &Path) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |text: String| args.push(text);
    add("--parsable".into());
    add(format!("--job-name={name}"));
    add(format!("--output={}/{name}-%j.log", pattern(dir)));
    add("--open-mode=append".into());
    add("--export=ALL".into());
    add("--requeue".into());
    add("--nodes=1".into());
    add("--ntasks=1".into());
    let time_s = settings.leader_time.map(|time| time.0 as u64);
    takes(&Shape { cpus: 1, time_s, ..Shape::default() }, &mut add);
    named(settings, &mut add);
    settings.extra.iter().for_each(|extra| add(extra.clone()));
    add(script.display().to_string());
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_becomes_its_command() {
        let command = ["/opt/my tools/pipe", "worker", "--list", "/s/it's.list"].map(String::from);
        assert_eq!(
            script(&["module load cuda".into()], &command, ""),
            "#!/bin/bash\nmodule load cuda\nexec '/opt/my tools/pipe' worker --list '/s/it'\\''s.list'\n"
        );
        let read = script(&[], &["cat".into()], "a $b\nc\n");
        assert_eq!(read, "#!/bin/bash\nexec cat <<'end of input'\na $b\nc\nend of input\n");
    }

    #[test]
    fn arguments_say_what_is_wanted_and_nothing_else() {
        let settings = Settings {
            partition: Some("gpu".into()),
            qos: Some("low".into()),
            extra: vec!["--nice=10".into()],
            ..Settings::default()
        };
        let shape = Shape {
            cpus: 4,
            gpus: 2,
            gpu_type: Some("a100".into()),
            memory: 1 << 30,
            time_s: Some(61),
        };
        let array = Array {
            name: "pipe-x-1".into(),
            script: "/s/1.sh".into(),
            shape,
            count: 3,
            output: "/s/100%/1".into(),
            exclude: vec!["n1".into(), "n2".into()],
            margin_s: 120,
        };
        assert_eq!(
            arguments(&settings, &array).join(" "),
            "--parsable --job-name=pipe-x-1 --array=0-2 --output=/s/100%%/1-%a.out --open-mode=append \
             --export=ALL --no-requeue --nodes=1 --ntasks=1 --cpus-per-task=4 --gres=gpu:a100:2 \
             --mem=1024M --time=2 --signal=B:USR1@120 --exclude=n1,n2 --partition=gpu --qos=low \
             --nice=10 /s/1.sh"
        );
        let one = Array { count: 1, shape: Shape::default(), margin_s: 0, ..array };
        let line = arguments(&Settings::default(), &one).join(" ");
        assert!(line.contains("--output=/s/100%%/1-0.out") && !line.contains("--array"), "{line}");
        assert_eq!(one.output_of(0), Path::new("/s/100%/1-0.out"));
        for absent in ["--gres", "--mem", "--time", "--signal", "--partition"] {
            assert!(!line.contains(absent), "{line}");
        }
    }
}
