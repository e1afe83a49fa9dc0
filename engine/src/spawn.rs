//! Starts a program as `std::process` does, without a copy of this process: for the moment between
//! the start and the new program, the child works in our memory, on a stack of its own, while the
//! thread that starts it sleeps. A copy (`fork`) takes longer than many a small program does, and
//! what `std::process` has instead cannot tie the child's life to ours. Knows no steps.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::ptr::null;

use libc::{c_char, c_int, c_void};
use rustix::process::{Pid, WaitOptions, waitpid};

/// What is searched where `PATH` is not set.
const PATH: &str = "/bin:/usr/bin";
/// Runs a script that does not say what runs it.
const SHELL: &CStr = c"/bin/sh";
/// Of the child, until its program has one.
const STACK: usize = 64 << 10;
/// Signals that a process of ours may have handlers for: all but those of real time.
const SIGNALS: c_int = 31;

/// What to start, and how.
pub(crate) struct Program<'a> {
    /// A name to be searched in `PATH` of the environment, or a path.
    pub name: &'a Path,
    /// Without the name.
    pub arguments: &'a [String],
    /// All of it.
    pub environment: Vec<(OsString, OsString)>,
    /// Where it works.
    pub dir: &'a Path,
    /// Its standard input.
    pub input: BorrowedFd<'a>,
    /// Its standard output and error; without it, ours.
    pub output: Option<BorrowedFd<'a>>,
    /// Its standard output, when that is another.
    pub file: Option<BorrowedFd<'a>>,
}

/// A program at work, the first of a process group; killed when the thread that started it ends.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    status: Option<ExitStatus>,
}

impl Child {
    /// Its process and its group.
    pub fn id(&self) -> Pid {
        self.pid
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// As `waitpid`.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            let ended = waitpid(Some(self.pid), WaitOptions::NOHANG)?;
            self.status = ended.map(|(_, status)| ExitStatus::from_raw(status.as_raw()));
        }
        Ok(self.status)
    }
}

impl Program<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// As `execvp`; a text with a zero byte in it.
    pub fn spawn(&self) -> io::Result<Child> {
        let files = List::of(self.files()?);
        let mut arguments = vec![text(self.name.as_os_str())?];
        for argument in self.arguments {
            arguments.push(text(argument.as_ref())?);
        }
        let arguments = List::of(arguments);
        let pair = |(name, value): &(OsString, OsString)| {
            text(&[name.as_os_str(), OsStr::new("="), value].into_iter().collect::<OsString>())
        };
        let environment = List::of(self.environment.iter().map(pair).collect::<io::Result<_>>()?);
        // The shell, the script, and what follows the script's own name.
        let mut shell = vec![SHELL.as_ptr(), null()];
        shell.extend_from_slice(&arguments.pointers[1..]);
        let dir = text(self.dir.as_os_str())?;
        let raw = |fd: Option<BorrowedFd>| fd.map_or(-1, |fd| fd.as_raw_fd());
        start(&mut Setting {
            files: files.pointers.as_ptr(),
            arguments: arguments.pointers.as_ptr(),
            shell: shell.as_mut_ptr(),
            environment: environment.pointers.as_ptr(),
            dir: dir.as_ptr(),
            input: self.input.as_raw_fd(),
            output: raw(self.file.or(self.output)),
            error_output: raw(self.output),
            parent: rustix::process::getpid().as_raw_nonzero().get(),
            // SAFETY: a set of signals is plain bits.
            mask: unsafe { MaybeUninit::zeroed().assume_init() },
            error: 0,
        })
    }

    /// The files to try, in their order.
    fn files(&self) -> io::Result<Vec<CString>> {
        let name = self.name.as_os_str();
        if name.as_bytes().contains(&b'/') {
            return Ok(vec![text(name)?]);
        }
        let path = self.environment.iter().find(|(name, _)| name == "PATH");
        let path = path.map_or(OsStr::new(PATH), |(_, path)| path);
        let mut files = Vec::new();
        for place in path.as_bytes().split(|b| *b == b':') {
            let place = Path::new(OsStr::from_bytes(if place.is_empty() { b"." } else { place }));
            let file = place.join(name);
            // From where the program works it can only be looked for by the child.
            let absent =
                |e: io::Error| matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory);
            if !place.is_absolute() || !file.symlink_metadata().is_err_and(absent) {
                files.push(text(file.as_os_str())?);
            }
        }
        match files.is_empty() || name.is_empty() {
            true => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            false => Ok(files),
        }
    }
}

fn text(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.to_os_string().into_vec())?)
}

/// Texts as C has them: pointers, the last one null.
struct List {
    pointers: Vec<*const c_char>,
    _texts: Vec<CString>,
}

impl List {
    fn of(texts: Vec<CString>) -> List {
        let pointers = texts.iter().map(|text| text.as_ptr()).chain([null()]).collect();
        List { pointers, _texts: texts }
    }
}

/// What the child needs, made before it starts: it may allocate nothing.
struct Setting {
    files: *const *const c_char,
    arguments: *const *const c_char,
    shell: *mut *const c_char,
    environment: *const *const c_char,
    dir: *const c_char,
    input: RawFd,
    output: RawFd,
    error_output: RawFd,
    parent: c_int,
    mask: libc::sigset_t,
    /// Why it could not start.
    error: c_int,
}

fn start(setting: &mut Setting) -> io::Result<Child> {
    let mut stack = vec![0u128; STACK / 16];
    let top = stack.as_mut_ptr_range().end.cast::<c_void>();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let all = all_signals();
    // SAFETY: `begin` uses nothing but system calls, `setting` and a stack that nobody else has, all
    // of which outlive it: this thread sleeps until the program has begun or the child is gone. No
    // signal is handled on the stack of the child, since all are blocked until its handlers are gone.
    let (pid, error) = unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut setting.mask);
        let mask = setting.mask;
        let pid = libc::clone(begin, top, flags, std::ptr::from_mut(setting).cast());
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &mask, std::ptr::null_mut());
        (pid, error)
    };
    let pid = (pid > 0).then(|| Pid::from_raw(pid)).flatten().ok_or(error)?;
    // SAFETY: the child is done with it; what it wrote is seen.
    match unsafe { std::ptr::read_volatile(&raw const setting.error) } {
        0 => Ok(Child { pid, status: None }),
        error => {
            let _ = waitpid(Some(pid), WaitOptions::empty());
            Err(io::Error::from_raw_os_error(error))
        }
    }
}

/// Every signal.
fn all_signals() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: it fills the set.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        set.assume_init()
    }
}

/// The child, up to its program.
extern "C" fn begin(setting: *mut c_void) -> c_int {
    // SAFETY: see `start`; nothing here allocates, locks or panics.
    unsafe {
        let setting = setting.cast::<Setting>();
        let error = prepare(&*setting).err().unwrap_or_else(|| execute(&*setting));
        std::ptr::write_volatile(&raw mut (*setting).error, error);
        libc::_exit(127)
    }
}

unsafe fn prepare(setting: &Setting) -> Result<(), c_int> {
    let well = |result: c_int| if result < 0 { Err(errno()) } else { Ok(()) };
    // SAFETY: system calls, on what `Setting` says.
    unsafe {
        well(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if libc::getppid() != setting.parent {
            libc::_exit(127); // it has ended meanwhile
        }
        well(libc::setpgid(0, 0))?;
        well(libc::dup2(setting.input, libc::STDIN_FILENO))?;
        if setting.output >= 0 {
            well(libc::dup2(setting.output, libc::STDOUT_FILENO))?;
        }
        if setting.error_output >= 0 {
            well(libc::dup2(setting.error_output, libc::STDERR_FILENO))?;
        }
        well(libc::chdir(setting.dir))?;
        for signal in 1..=SIGNALS {
            let mut old = MaybeUninit::<libc::sigaction>::zeroed();
            if libc::sigaction(signal, null(), old.as_mut_ptr()) == 0 {
                let handler = (*old.as_ptr()).sa_sigaction;
                let ours = handler != libc::SIG_DFL && handler != libc::SIG_IGN;
                // Rust ignores it from the start of every program on.
                if ours || signal == libc::SIGPIPE {
                    libc::signal(signal, libc::SIG_DFL);
                }
            }
        }
        well(libc::sigprocmask(libc::SIG_SETMASK, &setting.mask, std::ptr::null_mut()))
    }
}

/// Tries one file after the other; comes back with the reason why none could be run.
unsafe fn execute(setting: &Setting) -> c_int {
    let (mut file, mut denied) = (setting.files, false);
    // SAFETY: lists of C's, and room for one text in the second place of `shell`.
    unsafe {
        while !(*file).is_null() {
            libc::execve(*file, setting.arguments, setting.environment);
            if errno() == libc::ENOEXEC {
                *setting.shell.add(1) = *file;
                libc::execve(SHELL.as_ptr(), setting.shell, setting.environment);
            }
            match errno() {
                libc::EACCES => denied = true,
                libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT => {}
                other => return other,
            }
            file = file.add(1);
        }
    }
    if denied { libc::EACCES } else { libc::ENOENT }
}

fn errno() -> c_int {
    // SAFETY: the thread that sleeps lends its own.
    unsafe { *libc::__errno_location() }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// How a program ends and what it prints.
    fn run(
        dir: &Path,
        name: &str,
        arguments: &[&str],
        path: &str,
    ) -> io::Result<(ExitStatus, String)> {
        let null = File::open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let arguments: Vec<String> = arguments.iter().map(|a| a.to_string()).collect();
        let mut child = Program {
            name: Path::new(name),
            arguments: &arguments,
            environment: vec![("PATH".into(), path.into()), ("X".into(), "a = b".into())],
            dir,
            input: null.as_fd(),
            output: Some(writer.as_fd()),
            file: None,
        }
        .spawn()?;
        drop(writer);
        assert_eq!(rustix::process::getpgid(Some(child.id())), Ok(child.id()));
        let mut told = String::new();
        reader.read_to_string(&mut told).unwrap();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return Ok((status, told));
            }
            std::thread::yield_now();
        }
    }

    fn script(dir: &Path, name: &str, text: &str, mode: u32) {
        fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        fs::write(dir.join(name), text).unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_program_gets_what_it_was_given_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let text = "pwd; env | grep -v ^_ | sort; cat; echo \"$0 $1\"; exit 7";
        let (status, told) = run(&dir, "sh", &["-c", text, "zero", "one two"], PATH).unwrap();
        let told: Vec<&str> = told.lines().filter(|line| !line.starts_with("PWD=")).collect();
        let own = dir.display().to_string();
        assert_eq!(told, [own.as_str(), "PATH=/bin:/usr/bin", "X=a = b", "zero one two"]);
        assert_eq!(status.code(), Some(7));
        // Rust ignores this signal; nobody else expects that.
        let (status, _) = run(&dir, "sh", &["-c", "kill -PIPE $$; echo on"], PATH).unwrap();
        assert_eq!(status.signal(), Some(libc::SIGPIPE));
    }

    #[test]
    fn a_program_is_searched_as_a_shell_does() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        script(dir, "first/it", "echo first $1", 0o600);
        script(dir, "second/it", "#!/bin/sh\necho second $1", 0o700);
        script(dir, "third/it", "echo third $1", 0o700);
        let tell = |path: &str| run(dir, "it", &["x"], path).map(|(_, told)| told);
        let (one, two) = (dir.join("first"), dir.join("second"));
        let path = format!("/nowhere:{}:{}:third", one.display(), two.display());
        assert_eq!(tell(&path).unwrap(), "second x\n", "the first may not be run");
        assert_eq!(tell("third").unwrap(), "third x\n", "from where it works; it names no shell");
        let kind = |path: &str| tell(path).unwrap_err().raw_os_error();
        assert_eq!(kind("first"), Some(libc::EACCES));
        assert_eq!(kind("/nowhere"), Some(libc::ENOENT));
        assert_eq!(kind("nowhere:"), Some(libc::ENOENT));
        script(dir, "it", "#!/no/such/program", 0o700);
        let own = dir.join("it").display().to_string();
        assert_eq!(run(dir, &own, &[], PATH).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(run(dir, "sh", &["-c", "a\0b"], PATH).is_err());
    }

    #[test]
    fn it_ends_with_the_thread_that_started_it() {
        let start = || {
            let null = File::open("/dev/null").unwrap();
            let program = Program {
                name: Path::new("sleep"),
                arguments: &["60".to_string()],
                environment: Vec::new(),
                dir: Path::new("/"),
                input: null.as_fd(),
                output: None,
                file: None,
            };
            program.spawn().unwrap()
        };
        let mut child = std::thread::spawn(start).join().unwrap();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return assert_eq!(status.signal(), Some(libc::SIGKILL));
            }
            std::thread::yield_now();
        }
    }
}
