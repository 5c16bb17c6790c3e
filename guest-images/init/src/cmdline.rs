//! What the kernel command line asks init for: `shoal.*` words, and the workload's arguments behind ` -- `.
//!
//! Words are split as the kernel splits them: at white space outside double quotes; the quotes are dropped.

use std::net::IpAddr;
use std::time::Duration;

/// Longest command line that is read, in bytes; Linux on x86 keeps 2048.
pub const MAX_CMDLINE: usize = 8192;
const MAX_WORDS: usize = 1024;
/// Shorter than the ten seconds that a host gives a guest to stop, so that init can still say goodbye.
const DEFAULT_GRACE: Duration = Duration::from_secs(7);
const MAX_GRACE: u64 = 3600;

/// What to do with the machine when the workload has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExit {
    /// Power off; the default.
    PowerOff,
    /// Reset, which most VMMs take as the end as well.
    Reboot,
}

/// An interface address with the length of its prefix in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// The prefix, at most 32 or 128.
    pub prefix: u8,
}

/// A file system to mount, `shoal.mount=DEV:DIR:FSTYPE[:OPTIONS]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device, or whatever the file system takes for one.
    pub source: String,
    /// The directory, made when it is missing.
    pub target: String,
    /// The file system's name.
    pub fstype: String,
    /// Comma-separated options, or empty.
    pub options: String,
}

/// All that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `shoal.exec=`, else the first word behind ` -- `: the workload's program.
    pub program: Option<String>,
    /// The (other) words behind ` -- `.
    pub arguments: Vec<String>,
    /// `shoal.env.NAME=VALUE`, in order.
    pub environment: Vec<(String, String)>,
    /// `shoal.hostname=`.
    pub hostname: Option<String>,
    /// `shoal.ip=ADDRESS/PREFIX`, one for each.
    pub addresses: Vec<Address>,
    /// `shoal.gw=`, one for each address family.
    pub gateways: Vec<IpAddr>,
    /// `shoal.dns=`, in order, separated by commas or one for each.
    pub nameservers: Vec<IpAddr>,
    /// `shoal.mount=`, in order.
    pub mounts: Vec<Mount>,
    /// `shoal.grace=SECONDS`: how long a workload may take to end when it is asked to.
    pub grace: Duration,
    /// `shoal.on_exit=`.
    pub on_exit: OnExit,
    /// Words that were meant for init and are not usable, told on the console.
    pub problems: Vec<String>,
}

impl Config {
    /// Reads a command line. It never fails: what is wrong is listed in `problems` and left out.
    pub fn parse(line: &str) -> Config {
        let mut config = Config {
            program: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            hostname: None,
            addresses: Vec::new(),
            gateways: Vec::new(),
            nameservers: Vec::new(),
            mounts: Vec::new(),
            grace: DEFAULT_GRACE,
            on_exit: OnExit::PowerOff,
            problems: Vec::new(),
        };
        let mut words = words(line).into_iter();
        for word in words.by_ref().take_while(|w| w != "--") {
            let Some((key, value)) = word.strip_prefix("shoal.").and_then(|w| w.split_once('=')) else {
                continue;
            };
            if let Err(why) = config.set(key, value) {
                config
                    .problems
                    .push(format!("shoal.{key}={value}: {why}; this word is ignored"));
            }
        }
        let mut rest = words.peekable();
        if config.program.is_none() && rest.peek().is_some() {
            config.program = rest.next();
        }
        config.arguments = rest.collect();
        config
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "exec" if value.is_empty() => return Err("wants the path of a program"),
            "exec" => self.program = Some(value.to_owned()),
            "hostname" if value.is_empty() || value.len() > 64 => return Err("wants 1 to 64 bytes"),
            "hostname" => self.hostname = Some(value.to_owned()),
            "ip" => self.addresses.push(address(value)?),
            "gw" => self
                .gateways
                .push(value.parse().map_err(|_| "wants an IP address")?),
            "dns" => {
                for one in value.split(',') {
                    self.nameservers.push(
                        one.parse()
                            .map_err(|_| "wants IP addresses with commas between")?,
                    );
                }
            }
            "mount" => self.mounts.push(mount(value)?),
            "grace" => {
                let seconds = value.parse().ok().filter(|s| *s <= MAX_GRACE);
                self.grace = Duration::from_secs(seconds.ok_or("wants 0 to 3600 seconds")?);
            }
            "on_exit" => {
                self.on_exit = match value {
                    "poweroff" => OnExit::PowerOff,
                    "reboot" => OnExit::Reboot,
                    _ => return Err("wants poweroff or reboot"),
                }
            }
            _ => match key.strip_prefix("env.") {
                Some(name) if !name.is_empty() => self.environment.push((name.to_owned(), value.to_owned())),
                _ => return Err("init knows no such parameter"),
            },
        }
        Ok(())
    }
}

fn address(text: &str) -> Result<Address, &'static str> {
    const WHY: &str = "wants ADDRESS/PREFIX, as in 192.0.2.2/24";
    let (ip, prefix) = text.split_once('/').ok_or(WHY)?;
    let ip: IpAddr = ip.parse().map_err(|_| WHY)?;
    let prefix = prefix.parse().map_err(|_| WHY)?;
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    if prefix > longest {
        Err(WHY)
    } else {
        Ok(Address { ip, prefix })
    }
}

fn mount(text: &str) -> Result<Mount, &'static str> {
    let mut parts = text.splitn(4, ':').map(str::to_owned);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(source), Some(target), Some(fstype)) if target.starts_with('/') && !fstype.is_empty() => {
            Ok(Mount {
                source,
                target,
                fstype,
                options: parts.next().unwrap_or_default(),
            })
        }
        _ => Err("wants DEVICE:DIRECTORY:FSTYPE[:OPTIONS] with an absolute directory"),
    }
}

fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut begun, mut quoted) = (String::new(), false, false);
    for c in line.chars() {
        match c {
            '"' => (quoted, begun) = (!quoted, true),
            c if c.is_whitespace() && !quoted => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            c => {
                word.push(c);
                begun = true;
            }
        }
        if words.len() == MAX_WORDS {
            return words;
        }
    }
    if begun {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_line() {
        let c = Config::parse(
            "console=ttyS0 shoal.exec=/bin/app shoal.hostname=web-1 shoal.ip=192.0.2.2/24 shoal.ip=2001:db8::2/64 \
             shoal.gw=192.0.2.1 shoal.gw=2001:db8::1 shoal.dns=192.0.2.53,2001:db8::53 shoal.env.A=1 \
             shoal.env.B=\"two words=x\" shoal.mount=/dev/vdb:/data:ext4:ro,noatime shoal.grace=3 \
             shoal.on_exit=reboot -- --listen \"a b\" \"\" --",
        );
        assert_eq!(c.problems, Vec::<String>::new());
        assert_eq!(c.program.as_deref(), Some("/bin/app"));
        assert_eq!(c.arguments, ["--listen", "a b", "", "--"]);
        assert_eq!(c.hostname.as_deref(), Some("web-1"));
        assert_eq!(
            c.addresses[0],
            Address {
                ip: "192.0.2.2".parse().unwrap(),
                prefix: 24
            }
        );
        assert_eq!(
            c.addresses[1],
            Address {
                ip: "2001:db8::2".parse().unwrap(),
                prefix: 64
            }
        );
        assert_eq!((c.gateways.len(), c.nameservers.len()), (2, 2));
        assert_eq!(c.environment[1], ("B".into(), "two words=x".into()));
        assert_eq!(c.mounts[0].options, "ro,noatime");
        assert_eq!((c.grace, c.on_exit), (Duration::from_secs(3), OnExit::Reboot));
    }

    #[test]
    fn without_exec_the_first_word_behind_the_dashes_is_the_program() {
        let c = Config::parse("quiet -- /bin/sh -c \"echo hi\"");
        assert_eq!(c.program.as_deref(), Some("/bin/sh"));
        assert_eq!(c.arguments, ["-c", "echo hi"]);
    }

    #[test]
    fn nothing_asked_for() {
        let c = Config::parse("quiet root=/dev/vda");
        assert_eq!((c.program, c.arguments.len(), c.problems.len()), (None, 0, 0));
        assert_eq!(c.grace, DEFAULT_GRACE);
    }

    #[test]
    fn each_bad_word_is_told_and_left_out() {
        for word in [
            "shoal.ip=192.0.2.2",
            "shoal.ip=192.0.2.2/33",
            "shoal.ip=x/8",
            "shoal.ip=::1/129",
            "shoal.gw=router",
            "shoal.dns=1.1.1.1,",
            "shoal.mount=/dev/vdb",
            "shoal.mount=/dev/vdb:data:ext4",
            "shoal.mount=/dev/vdb:/data:",
            "shoal.grace=-1",
            "shoal.grace=3601",
            "shoal.on_exit=explode",
            "shoal.exec=",
            "shoal.hostname=",
            "shoal.env.=1",
            "shoal.colour=red",
        ] {
            let c = Config::parse(word);
            assert_eq!(c.problems.len(), 1, "{word}");
            assert!(c.problems[0].starts_with(word), "{:?}", c.problems);
            assert!(
                c.addresses.is_empty() && c.mounts.is_empty() && c.program.is_none(),
                "{word}"
            );
        }
    }

    #[test]
    fn a_quote_left_open_and_many_words_are_bounded() {
        assert_eq!(Config::parse("-- \"a b").program.as_deref(), Some("a b"));
        let many = "x ".repeat(100_000);
        assert_eq!(words(&many).len(), MAX_WORDS);
    }
}
