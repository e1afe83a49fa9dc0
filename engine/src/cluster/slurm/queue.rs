//! Lines of `squeue` and `sacct`, as text: their JSON has other fields in every release, and exit
//! codes that say nothing. Pure.

use crate::cluster::batch::{End, State, Status};

/// What `squeue` is asked for, a line a task.
pub(super) const SQUEUE: &str = "%i|%F|%K|%T|%r|%N|%j";
/// What `sacct` is.
pub(super) const SACCT: &str = "JobID,State,NodeList,JobName";

/// A line of `squeue -h -r -o` [`SQUEUE`].
pub(super) fn squeue_line(line: &str) -> Option<Status> {
    let fields: Vec<&str> = line.trim_end().splitn(7, '|').collect();
    let [id, array, task, state, reason, host, name] = fields[..] else { return None };
    Some(Status {
        name: name.trim().into(),
        array: array.into(),
        // `N/A` of what is no array.
        task: task.parse().unwrap_or(0),
        id: id.into(),
        state: state_of(state)?,
        reason: if reason == "None" { String::new() } else { reason.into() },
        host: host_of(host),
    })
}

/// A line of `sacct -X -P -n -o` [`SACCT`].
pub(super) fn sacct_line(line: &str) -> Option<Status> {
    let fields: Vec<&str> = line.trim_end().splitn(4, '|').collect();
    let [id, state, host, name] = fields[..] else { return None };
    let (array, task) = id.split_once('_').unwrap_or((id, "0"));
    Some(Status {
        name: name.trim().into(),
        array: array.into(),
        // `12_[3-9]` of what still waits.
        task: task.parse().ok()?,
        id: id.into(),
        // `CANCELLED by 1000`
        state: state_of(state.split_whitespace().next()?.trim_end_matches('+'))?,
        reason: state.into(),
        host: host_of(host),
    })
}

fn host_of(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty() && text != "(null)" && !text.starts_with("None")).then(|| text.to_string())
}

/// `None` for what is no state: it says nothing. A state that is not known here may be none of an end.
fn state_of(word: &str) -> Option<State> {
    Some(match word {
        "PENDING" | "REQUEUED" | "REQUEUE_FED" | "REQUEUE_HOLD" | "RESV_DEL_HOLD"
        | "SPECIAL_EXIT" => State::Pending,
        // It has not ended: its node may still write.
        "COMPLETING" => State::Ending,
        "RUNNING" | "CONFIGURING" | "RESIZING" | "SIGNALING" | "STAGE_OUT" | "STOPPED"
        | "SUSPENDED" | "UPDATE_DB" | "POWER_UP_NODE" => State::Running,
        "COMPLETED" => State::Ended(End::Completed),
        "FAILED" | "LAUNCH_FAILED" | "RECONFIG_FAIL" => State::Ended(End::Failed),
        "TIMEOUT" | "DEADLINE" => State::Ended(End::TimedOut),
        "OUT_OF_MEMORY" => State::Ended(End::OutOfMemory),
        "NODE_FAIL" | "BOOT_FAIL" => State::Ended(End::NodeFailed),
        "CANCELLED" | "REVOKED" => State::Ended(End::Cancelled),
        "PREEMPTED" => State::Ended(End::Preempted),
        _ if !word.is_empty() && word.chars().all(|c| c.is_ascii_uppercase() || c == '_') => {
            State::Running
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_squeue_as_they_were_seen() {
        let waits = squeue_line("3_9|3|9|PENDING|Resources||pipe-test\n").unwrap();
        assert_eq!(
            waits,
            Status {
                name: "pipe-test".into(),
                array: "3".into(),
                task: 9,
                id: "3_9".into(),
                state: State::Pending,
                reason: "Resources".into(),
                host: None,
            }
        );
        let runs = squeue_line("1_2|1|2|RUNNING|None|n2|pipe-test").unwrap();
        assert_eq!((runs.state, &runs.reason[..]), (State::Running, ""));
        assert_eq!(runs.host.as_deref(), Some("n2"));
        let single = squeue_line("4|4|N/A|NODE_FAIL|NodeDown|n1|a|b").unwrap();
        assert_eq!((single.task, &single.name[..]), (0, "a|b"));
        assert_eq!(single.state, State::Ended(End::NodeFailed));
        let newer = squeue_line("1|1|0|EXPEDITING|None||x").unwrap();
        assert_eq!(newer.state, State::Running, "no end that is known");
        for wrong in ["", "slurm_load_jobs error: Invalid job id specified", "1|1|0|?|None||x"] {
            assert_eq!(squeue_line(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn lines_of_sacct_as_they_were_seen() {
        let status = sacct_line("5_1|CANCELLED by 0|None assigned|pipe-x-1").unwrap();
        assert_eq!((status.state, status.host), (State::Ended(End::Cancelled), None));
        assert_eq!((&status.array[..], status.task, &status.name[..]), ("5", 1, "pipe-x-1"));
        let status = sacct_line("7|OUT_OF_MEMORY|n2|pipe-x-2").unwrap();
        assert_eq!((status.state, status.task), (State::Ended(End::OutOfMemory), 0));
        assert_eq!(sacct_line("5_[2-9]|PENDING|None assigned|pipe-x-1"), None);
        assert_eq!(sacct_line("Slurm accounting storage is disabled"), None);
    }
}
