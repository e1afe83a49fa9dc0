//! Programs for `sh` in which a shell has nothing to do but to start one program, which is then
//! started without it: words, and at most one file to read from and one to write to. The shell is
//! more than a quarter of the time of a small step. Knows no steps.
//!
//! Whatever a shell could do more with is left to it: variables, patterns, `~`, a second command, names
//! that are its own. So is what does not work without it, for it to say why.

/// One program, and where it reads and writes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plain {
    /// The program and its arguments.
    pub words: Vec<String>,
    /// What `<` names.
    pub input: Option<String>,
    /// What `>` names.
    pub output: Option<String>,
}

/// Words of the language, and commands that dash, bash or busybox have built in and do not find in
/// `PATH`, or that do there something else. Sorted.
#[rustfmt::skip]
const OWN: [&str; 80] = [
    ".", ":", "[", "[[", "alias", "bg", "bind", "break", "builtin", "caller", "case", "cd", "chdir",
    "command", "compgen", "complete", "compopt", "continue", "coproc", "declare", "dirs", "disown", "do",
    "done", "echo", "elif", "else", "enable", "esac", "eval", "exec", "exit", "export", "false", "fc",
    "fg", "fi", "for", "function", "getopts", "hash", "help", "history", "if", "in", "jobs", "kill",
    "let", "local", "logout", "mapfile", "popd", "printf", "pushd", "pwd", "read", "readarray",
    "readonly", "return", "select", "set", "shift", "shopt", "source", "suspend", "test", "then", "time",
    "times", "trap", "true", "type", "typeset", "ulimit", "umask", "unalias", "unset", "until", "wait",
    "while",
];

/// What the arguments `sh -c TEXT` ask for, if that takes no shell.
pub(crate) fn plain(arguments: &[String]) -> Option<Plain> {
    let [shell, flag, text] = arguments else { return None };
    if shell != "sh" || flag != "-c" {
        return None;
    }
    let mut plain = Plain::default();
    let mut rest = text.trim_matches([' ', '\n']);
    while let Some(first) = rest.chars().next() {
        let place = match first {
            '<' => Some(&mut plain.input),
            '>' => Some(&mut plain.output),
            _ => None,
        };
        let start = if place.is_some() { rest[1..].trim_start_matches(' ') } else { rest };
        let (word, after) = word(start)?;
        match place {
            None => plain.words.push(word),
            Some(None) if !ordinary(&word) => return None,
            Some(file @ None) => *file = Some(word),
            Some(Some(_)) => return None,
        }
        rest = after.trim_start_matches(' ');
    }
    let name = plain.words.first()?;
    // `name=value`, and a job's number.
    let special = name.is_empty() || name.contains('=') || name.starts_with('%');
    // It leads a group, which nobody may who would begin a session.
    let session = plain.words.iter().any(|word| word.ends_with("setsid"));
    (!special && !session && OWN.binary_search(&name.as_str()).is_err()).then_some(plain)
}

/// The word that `text` begins with, without its quotes, and what follows it.
fn word(text: &str) -> Option<(String, &str)> {
    let (mut word, mut rest) = (String::new(), text);
    while let Some(c) = rest.chars().next().filter(|c| *c != ' ') {
        rest = &rest[c.len_utf8()..];
        match c {
            '\'' | '"' => {
                let (quoted, after) = rest.split_once(c)?;
                if c == '"' && quoted.contains(['$', '`', '\\', '!']) {
                    return None;
                }
                word.push_str(quoted);
                rest = after;
            }
            c if c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c) => word.push(c),
            _ => return None,
        }
    }
    (rest.len() < text.len()).then_some((word, rest))
}

/// Whether a file means the same to every process of a step: `/dev/stdout` and its like do not.
fn ordinary(file: &str) -> bool {
    file == "/dev/null" || !file.is_empty() && !file.starts_with('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<Plain> {
        plain(&["sh", "-c", text].map(String::from))
    }

    fn words(text: &str) -> Vec<String> {
        let found = of(text).unwrap_or_else(|| panic!("{text}"));
        assert_eq!((found.input, found.output), (None, None), "{text}");
        found.words
    }

    #[test]
    fn one_program_takes_no_shell() {
        assert_eq!(words("python  train.py --lr=3e-4 \n"), ["python", "train.py", "--lr=3e-4"]);
        assert_eq!(words("./a 'b  c'd \"e 'f\" '' 'g\n$h'"), ["./a", "b  cd", "e 'f", "", "g\n$h"]);
        let found = of("cat in/a/x 'in/a/a b' > out/o").unwrap();
        assert_eq!(found.words, ["cat", "in/a/x", "in/a/a b"]);
        assert_eq!((found.input, found.output), (None, Some("out/o".into())));
        let found = of("<in/x sort >'out/a b' -r").unwrap();
        assert_eq!(found.words, ["sort", "-r"]);
        assert_eq!((found.input, found.output), (Some("in/x".into()), Some("out/a b".into())));
        assert_eq!(of("a > /dev/null").unwrap().output, Some("/dev/null".into()));
    }

    #[rustfmt::skip]
    const FOR_THE_SHELL: &[&str] = &[
        "", " ", "a; b", "a & b", "a | b", "a && b", "a\nb", "a $x", "a `b`", "a \\b", "a *", "a ?",
        "a [b]", "a ~", "a ~/b", "(a)", "{ a; }", "a {b,c}", "a # b", "!a", "a^b", "a\tb", "X=1 a", "X=1",
        "''", "%1", "a \"$x\"", "a \"\\n\"", "a 'b", "a \"b", "a >> b", "a >| b", "a >& b", "a 2> b",
        "a 2>&1", "a<b", "a>b", "a << b", "a <> b", "a <& 3", "a > b > c", "a < b < c", "a >", "a > ''",
        "a > /dev/stdout", "a < /proc/self/fd/0", "> out/x", "a > b>c", "é", "echo a", "cd x", "exec a",
        "'echo' a", "if a", "while a", "[ a ]", ". a", ": a", "time a",
        "setsid a", "nice /usr/bin/setsid a",
    ];

    #[test]
    fn all_else_is_for_the_shell() {
        for text in FOR_THE_SHELL {
            assert_eq!(of(text), None, "{text}");
        }
        let other = |arguments: &[&str]| {
            plain(&arguments.iter().map(|a| a.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(other(&["sh", "-ec", "a"]), None);
        assert_eq!(other(&["bash", "-c", "a"]), None);
        assert_eq!(other(&["sh", "-c", "a", "b"]), None);
        assert!(OWN.is_sorted());
    }

    /// A shell reads what we take for words as we do: random texts, of which those that are plain.
    #[test]
    fn a_shell_agrees() {
        const LETTERS: &[u8] = b"ab1 ''\"\"=/.:,@%+-_$\\`*?[~#!&|;(){^\n ";
        let (mut seed, mut script, mut ours, mut count) = (7_u64, String::new(), String::new(), 0);
        while count < 2000 {
            let mut next = |n: usize| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) as usize % n
            };
            let text: String =
                (0..1 + next(8)).map(|_| char::from(LETTERS[next(LETTERS.len())])).collect();
            let Some(found) = of(&format!("x {text}")) else { continue };
            script += &format!("printf '[%s]' {}; echo\n", text.trim_matches([' ', '\n']));
            // Without any, `printf` prints its text once, too.
            ours += &match &found.words[1..] {
                [] => "[]\n".to_string(),
                words => words.iter().map(|word| format!("[{word}]")).collect::<String>() + "\n",
            };
            count += 1;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "a pattern would find it").unwrap();
        let mut shell = std::process::Command::new("sh");
        let told = shell.args(["-c", &script]).current_dir(&dir).output().unwrap();
        assert_eq!(String::from_utf8(told.stderr).unwrap(), "");
        assert_eq!(String::from_utf8(told.stdout).unwrap(), ours);
    }
}
