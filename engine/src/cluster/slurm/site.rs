//! What a site has, by `sinfo` and `scontrol show config`. Pure.

/// A partition as its nodes are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// Cpus of its smallest node.
    pub cpus: u32,
    /// GPUs of the node that has most.
    pub gpus: u32,
    /// Wall time that jobs get which ask for none, in seconds.
    pub default_s: Option<u64>,
    /// Nodes.
    pub nodes: u32,
    /// Most tasks of an array.
    pub max_array: usize,
}

/// What `sinfo` is asked for.
pub(super) const SINFO: &str = "%P|%c|%G|%l|%L|%D";

/// Reads `sinfo -h -o` [`SINFO`]: of `partition`, else of the default one, else of all.
pub(super) fn site(sinfo: &str, partition: Option<&str>) -> Option<Site> {
    let rows: Vec<Vec<&str>> = sinfo.lines().map(|line| line.trim().split('|').collect()).collect();
    let rows: Vec<&Vec<&str>> = rows.iter().filter(|row| row.len() == 6).collect();
    let named = |row: &&&Vec<&str>| match partition {
        Some(names) => names.split(',').any(|name| row[0].trim_end_matches('*') == name),
        None => row[0].ends_with('*'),
    };
    let mut chosen: Vec<&Vec<&str>> = rows.iter().filter(named).copied().collect();
    if chosen.is_empty() && partition.is_none() {
        chosen = rows;
    }
    if chosen.is_empty() {
        return None;
    }
    let count = |text: &str| text.trim_end_matches('+').parse::<u32>().unwrap_or(0);
    let times = |row: &&Vec<&str>| seconds(row[4]).or_else(|| seconds(row[3]));
    Some(Site {
        cpus: chosen.iter().map(|row| count(row[1])).filter(|n| *n > 0).min().unwrap_or(1),
        gpus: chosen.iter().map(|row| gpus(row[2])).max().unwrap_or(0),
        default_s: chosen.iter().filter_map(times).min(),
        nodes: chosen.iter().map(|row| count(row[5])).sum(),
        max_array: 1001,
    })
}

/// `MaxArraySize` of `scontrol show config`.
pub(super) fn max_array(config: &str) -> Option<usize> {
    let line = config.lines().find(|line| line.trim_start().starts_with("MaxArraySize"))?;
    line.split('=').nth(1)?.trim().parse().ok()
}

/// `gpu:2`, `gpu:a100:4(S:0-1),nvme:1`, `(null)`.
fn gpus(gres: &str) -> u32 {
    let one = |text: &str| {
        let text = text.split('(').next().unwrap_or_default();
        let rest = text.strip_prefix("gpu")?;
        match rest.rsplit(':').next().unwrap_or_default() {
            "" => Some(1),
            number => number.parse::<u32>().ok().or(Some(1)),
        }
    };
    // Commas also stand within parentheses, where no `gpu` does.
    gres.split(',').filter_map(one).sum()
}

/// `1-00:00:00`, `30:00`, `5`; none of `infinite` and `n/a`.
pub(super) fn seconds(text: &str) -> Option<u64> {
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (days.parse::<u64>().ok()?, rest),
        None => (0, text),
    };
    let parts: Option<Vec<u64>> = rest.split(':').map(|part| part.parse().ok()).collect();
    let clock = match (parts?.as_slice(), text.contains('-')) {
        ([h], true) => h * 3600,
        ([h, m], true) => h * 3600 + m * 60,
        ([m], false) => m * 60,
        ([m, s], false) => m * 60 + s,
        ([h, m, s], _) => h * 3600 + m * 60 + s,
        _ => return None,
    };
    Some(days * 86_400 + clock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_is_its_partition() {
        let text = "main*|4|gpu:2|infinite|n/a|3\ngpu|64+|gpu:a100:4(S:0-1),nvme:1|2-00:00:00|1:00:00|10\ngpu|32|gpu:h100:8|2-00:00:00|1:00:00|2\n";
        let main = site(text, None).unwrap();
        assert_eq!((main.cpus, main.gpus, main.default_s, main.nodes), (4, 2, None, 3));
        let gpu = site(text, Some("gpu")).unwrap();
        assert_eq!((gpu.cpus, gpu.gpus, gpu.default_s, gpu.nodes), (32, 8, Some(3600), 12));
        assert_eq!(site(text, Some("gup")), None);
        assert_eq!(site("a|2|(null)|5|n/a|1", None).unwrap().gpus, 0, "no default: all");
    }

    #[test]
    fn numbers_as_slurm_writes_them() {
        assert_eq!(
            max_array("MailProg = /bin/true\nMaxArraySize            = 10001\n"),
            Some(10001)
        );
        let cases = [
            ("1-00:00:00", Some(86_400)),
            ("2-12", Some(216_000)),
            ("30:00", Some(1800)),
            ("5", Some(300)),
            ("1:00:00", Some(3600)),
            ("infinite", None),
            ("n/a", None),
        ];
        for (text, expected) in cases {
            assert_eq!(seconds(text), expected, "{text}");
        }
        assert_eq!((gpus("gpu"), gpus("gpu:tesla:2(S:0,1)"), gpus("(null)")), (1, 2, 0));
    }
}
