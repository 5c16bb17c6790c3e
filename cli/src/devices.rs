//! Devices as they are written on the command line: what they stand on, and words about them behind colons.

use anyhow::{Result, anyhow, bail};
use shoal_api_types::{Disk, DiskEngine, Limits, Network, Rate, SetLimits};

/// Path and description (without path) of a disk. What is no word about disks belongs to the path.
pub fn disk(text: &str) -> Result<(&str, Disk)> {
    let (mut path, mut disk) = (text, Disk::default());
    while let Some((rest, word)) = path.rsplit_once(':') {
        match word {
            "ro" => disk.read_only = true,
            "io_uring" => disk.engine = DiskEngine::IoUring,
            "sync" => disk.engine = DiskEngine::Sync,
            word if queues(&mut disk.queues, word)? || limit(&mut disk.limits, word)? => {}
            _ => break,
        }
        path = rest;
    }
    Ok((path, disk))
}

/// A network interface.
pub fn network(text: &str) -> Result<Network> {
    let mut words = text.split(':');
    let mut network = Network {
        tap: words.next().unwrap_or_default().to_owned(),
        ..Network::default()
    };
    for word in words {
        let known = match word.split_once('.') {
            Some(("rx", word)) => limit(&mut network.rx_limits, word)?,
            Some(("tx", word)) => limit(&mut network.tx_limits, word)?,
            _ => queues(&mut network.queues, word)?,
        };
        if !known {
            bail!(
                "{word:?} says nothing about a network interface; use queues=N, rx.bandwidth=RATE, rx.operations=RATE, \
                 tx.bandwidth=RATE or tx.operations=RATE"
            );
        }
    }
    Ok(network)
}

/// What to ask for when the limits of `device` are to be `words`.
pub fn set_limits(device: &str, words: &[String]) -> Result<SetLimits> {
    let mut limits = Limits::default();
    for word in words.iter().filter(|word| *word != "none") {
        if !limit(&mut limits, word)? {
            bail!("{word:?} is no limit; use bandwidth=RATE, operations=RATE or none");
        }
    }
    if words.len() > 1 && words.iter().any(|word| word == "none") {
        bail!("\"none\" lifts all limits of the device, and cannot stand beside others");
    }
    let mut set = SetLimits::default();
    match device.split_once(':') {
        Some(("disk", id)) => drop(set.disks.insert(id.to_owned(), limits)),
        Some(("tap", rest)) => {
            let (tap, direction) = rest.rsplit_once(':').ok_or_else(|| {
                anyhow!("which direction of {rest:?}? write tap:{rest}:rx or tap:{rest}:tx")
            })?;
            let network = set.networks.entry(tap.to_owned()).or_default();
            match direction {
                "rx" => network.rx = Some(limits),
                "tx" => network.tx = Some(limits),
                other => bail!("{other:?} is no direction; use rx (to the guest) or tx (from the guest)"),
            }
        }
        None if device == "vsock" => set.vsock = Some(limits),
        None if device == "rng" => set.rng = Some(limits),
        _ => bail!("{device:?} names no device; use disk:ID, tap:NAME:rx, tap:NAME:tx, vsock or rng"),
    }
    Ok(set)
}

/// Takes `queues=N`. False: it is another word.
fn queues(queues: &mut u32, word: &str) -> Result<bool> {
    let Some(number) = word.strip_prefix("queues=") else {
        return Ok(false);
    };
    *queues = number
        .parse()
        .map_err(|_| anyhow!("{number:?} is no number of queues"))?;
    Ok(true)
}

/// Takes `bandwidth=RATE` and `operations=RATE`. False: it is neither.
fn limit(limits: &mut Limits, word: &str) -> Result<bool> {
    match word.split_once('=') {
        Some(("bandwidth", rate)) => limits.bandwidth = Some(self::rate(rate, 1024)?),
        Some(("operations", rate)) => limits.operations = Some(self::rate(rate, 1000)?),
        _ => return Ok(false),
    }
    Ok(true)
}

/// `10M` or `10M/1M`: per second, and at once. K, M and G are powers of `unit`.
fn rate(text: &str, unit: u64) -> Result<Rate> {
    let (per_second, burst) = match text.split_once('/') {
        Some((per_second, burst)) => (per_second, Some(number(burst, unit)?)),
        None => (text, None),
    };
    Ok(Rate {
        per_second: number(per_second, unit)?,
        burst,
    })
}

fn number(text: &str, unit: u64) -> Result<u64> {
    let error = || anyhow!("{text:?} is no rate; one looks like 500, 10M, or 10M/1M with its burst");
    let (digits, power) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 1),
        Some(b'M') => (&text[..text.len() - 1], 2),
        Some(b'G') => (&text[..text.len() - 1], 3),
        _ => (text, 0),
    };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(error());
    }
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(unit.pow(power)).ok_or_else(error)
}

/// Limits for people: ` bandwidth 10485760/s (burst 1048576)`.
pub fn shown(name: &str, limits: &Limits) -> String {
    let rates = [("bandwidth", limits.bandwidth), ("operations", limits.operations)];
    let shown = rates.into_iter().filter_map(|(what, rate)| {
        let Rate { per_second, burst } = rate?;
        let burst = burst.map(|b| format!(" (burst {b})")).unwrap_or_default();
        Some(format!(", {name}{what} {per_second}/s{burst}"))
    });
    shown.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bandwidth: Option<(u64, Option<u64>)>, operations: Option<(u64, Option<u64>)>) -> Limits {
        let rate = |(per_second, burst)| Rate { per_second, burst };
        Limits {
            bandwidth: bandwidth.map(rate),
            operations: operations.map(rate),
        }
    }

    #[test]
    fn reads_disks() {
        let is = |text, path, read_only, engine| {
            let (got, disk) = disk(text).unwrap();
            assert_eq!(
                (got, disk.read_only, disk.engine),
                (path, read_only, engine),
                "{text}"
            );
        };
        is("a.img", "a.img", false, DiskEngine::Sync);
        is("a.img:ro", "a.img", true, DiskEngine::Sync);
        is("a.img:io_uring:ro", "a.img", true, DiskEngine::IoUring);
        is("a:ro:b.img:io_uring", "a:ro:b.img", false, DiskEngine::IoUring);
        is("a.img:rw", "a.img:rw", false, DiskEngine::Sync);
        let (path, limited) = disk("a:bandwidth=10M/64K:ro:operations=2K").unwrap();
        assert_eq!((path, limited.read_only), ("a", true));
        let want = limits(Some((10 << 20, Some(64 << 10))), Some((2000, None)));
        assert_eq!((limited.limits, limited.queues), (want, 1));
        assert_eq!(disk("a:queues=4:ro").unwrap().1.queues, 4);
        assert!(disk("a:queues=x").is_err() && disk("a:bandwidth=").is_err());
    }

    #[test]
    fn reads_networks() {
        let n = network("tap0:rx.bandwidth=1G:tx.operations=5/1").unwrap();
        assert_eq!(n.tap, "tap0");
        assert_eq!(n.rx_limits, limits(Some((1 << 30, None)), None));
        assert_eq!(n.tx_limits, limits(None, Some((5, Some(1)))));
        assert_eq!(network("tap0").unwrap().rx_limits, Limits::default());
        assert_eq!((n.queues, network("tap0:queues=2").unwrap().queues), (1, 2));
        for bad in [
            "tap0:bandwidth=1",
            "tap0:rx.speed=1",
            "tap0:",
            "tap0:rx.bandwidth=x",
        ] {
            assert!(network(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn reads_changes_of_limits() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let set = set_limits("disk:data", &words("bandwidth=1K operations=7")).unwrap();
        assert_eq!(set.disks["data"], limits(Some((1024, None)), Some((7, None))));
        let set = set_limits("tap:tap0:tx", &words("operations=1/2")).unwrap();
        assert_eq!(set.networks["tap0"].tx, Some(limits(None, Some((1, Some(2))))));
        assert_eq!(set.networks["tap0"].rx, None);
        let none = Some(Limits::default());
        assert_eq!(set_limits("vsock", &words("none")).unwrap().vsock, none);
        assert_eq!(set_limits("rng", &words("none")).unwrap().rng, none);
        for (device, text, want) in [
            ("disk", "none", "names no device"),
            ("tap:tap0", "none", "which direction"),
            ("tap:tap0:up", "none", "no direction"),
            ("vsock", "speed=1", "no limit"),
            ("vsock", "none operations=1", "beside others"),
            ("vsock", "operations=", "no rate"),
            ("vsock", "operations=-1", "no rate"),
            ("vsock", "operations=1/", "no rate"),
            ("vsock", "bandwidth=1T", "no rate"),
            ("vsock", "bandwidth=99999999999999999999", "no rate"),
            ("vsock", "bandwidth=18446744073709551615G", "no rate"),
        ] {
            let error = set_limits(device, &words(text)).unwrap_err().to_string();
            assert!(error.contains(want), "{device} {text}: {error}");
        }
    }

    #[test]
    fn shows_limits() {
        let l = limits(Some((1024, Some(10))), Some((5, None)));
        assert_eq!(
            shown("rx ", &l),
            ", rx bandwidth 1024/s (burst 10), rx operations 5/s"
        );
        assert_eq!(shown("", &Limits::default()), "");
    }
}
