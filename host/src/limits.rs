//! Limits of a guest's devices that are changed, whether it runs or not.

use shoal_devices::limit::DeviceLimits;
use shoal_vmm::protocol::Request;

use crate::error::HostError;
use crate::spec::{GuestSpec, RateLimits};

/// Limits to be changed. What is not named stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitChanges {
    /// Of disks, by their ids.
    pub disks: Vec<(String, RateLimits)>,
    /// Of network interfaces, by their TAPs.
    pub networks: Vec<(String, NetworkLimits)>,
    /// Of the socket device.
    pub vsock: Option<RateLimits>,
    /// Of the entropy device.
    pub rng: Option<RateLimits>,
}

/// Limits of a network interface; a direction that is missing keeps its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkLimits {
    /// Packets to the guest.
    pub rx: Option<RateLimits>,
    /// Packets from the guest.
    pub tx: Option<RateLimits>,
}

/// A change of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// Its position among the guest's devices, as [`crate::resources::prepare`] orders them.
    device: u8,
    limits: DeviceLimits,
}

impl Change {
    /// What the VMM is asked for.
    pub fn request(self) -> Request {
        let Self { device, limits } = self;
        Request::SetLimits { device, limits }
    }

    /// Writes it into the guest's description.
    pub fn apply(self, spec: &mut GuestSpec) {
        let at = usize::from(self.device);
        let (disks, networks) = (spec.disks.len(), spec.networks.len());
        match self.limits {
            DeviceLimits::Net { rx, tx } => {
                if let Some(network) = spec.networks.get_mut(at.wrapping_sub(disks)) {
                    (network.rx_limits, network.tx_limits) = (rx, tx);
                }
            }
            DeviceLimits::All(limits) => match (spec.disks.get_mut(at), &mut spec.vsock) {
                (Some(disk), _) => disk.limits = limits,
                (None, Some(vsock)) if at == disks + networks => vsock.limits = limits,
                (None, _) => spec.rng_limits = limits,
            },
        }
    }
}

impl LimitChanges {
    /// The changes of each device, all of them checked.
    ///
    /// # Errors
    /// [`HostError::Invalid`] when the guest has no such device, or a number is out of range.
    pub(crate) fn of(&self, spec: &GuestSpec) -> Result<Vec<Change>, HostError> {
        let mut changes = Vec::new();
        let mut add = |device: usize, limits| {
            // A guest has 15 devices at most.
            let device = device as u8;
            changes.push(Change { device, limits });
        };
        for (id, limits) in &self.disks {
            let field = format!("disks.{id}");
            let at = spec.disks.iter().position(|d| d.id == *id);
            let at = at.ok_or_else(|| missing(&field, "disk", "id", id))?;
            check(&field, limits)?;
            add(at, DeviceLimits::All(*limits));
        }
        for (tap, limits) in &self.networks {
            let field = format!("networks.{tap}");
            let at = spec.networks.iter().position(|n| n.tap == *tap);
            let at = at.ok_or_else(|| missing(&field, "network interface", "TAP", tap))?;
            let network = &spec.networks[at];
            let rx = limits.rx.unwrap_or(network.rx_limits);
            let tx = limits.tx.unwrap_or(network.tx_limits);
            check(&format!("{field}.rx"), &rx)?;
            check(&format!("{field}.tx"), &tx)?;
            add(spec.disks.len() + at, DeviceLimits::Net { rx, tx });
        }
        let behind = spec.disks.len() + spec.networks.len();
        if let Some(limits) = &self.vsock {
            if spec.vsock.is_none() {
                return Err(HostError::invalid("vsock", "the guest has no socket device"));
            }
            check("vsock", limits)?;
            add(behind, DeviceLimits::All(*limits));
        }
        if let Some(limits) = &self.rng {
            check("rng", limits)?;
            add(
                behind + usize::from(spec.vsock.is_some()),
                DeviceLimits::All(*limits),
            );
        }
        Ok(changes)
    }
}

fn missing(field: &str, what: &str, key: &str, name: &str) -> HostError {
    HostError::invalid(field, format!("the guest has no {what} with the {key} {name:?}"))
}

fn check(field: &str, limits: &RateLimits) -> Result<(), HostError> {
    limits
        .check()
        .map_err(|(rate, bad)| HostError::invalid(format!("{field}.{rate}.{}", bad.field), bad.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Disk, Network, Rate, Vsock};

    fn spec() -> GuestSpec {
        let mut spec = GuestSpec::new("/k", 1, 64);
        spec.disks = ["a", "b"]
            .map(|id| Disk {
                id: id.into(),
                ..Disk::default()
            })
            .into();
        spec.networks = vec![Network {
            tap: "t".into(),
            ..Network::default()
        }];
        spec.vsock = Some(Vsock::default());
        spec
    }

    fn limits(n: u64) -> RateLimits {
        RateLimits {
            operations: Some(Rate::per_second(n)),
            ..RateLimits::default()
        }
    }

    #[test]
    fn each_device_gets_its_own_and_the_others_keep_theirs() {
        let mut spec = spec();
        spec.networks[0].rx_limits = limits(7);
        let changes = LimitChanges {
            disks: vec![("b".into(), limits(1))],
            networks: vec![(
                "t".into(),
                NetworkLimits {
                    tx: Some(limits(2)),
                    rx: None,
                },
            )],
            vsock: Some(limits(3)),
            rng: Some(limits(4)),
        };
        let changes = changes.of(&spec).unwrap();
        let devices: Vec<_> = changes.iter().map(|c| c.device).collect();
        assert_eq!(devices, [1, 2, 3, 4]);
        changes.iter().for_each(|c| c.apply(&mut spec));
        assert_eq!(
            (spec.disks[0].limits, spec.disks[1].limits),
            (RateLimits::default(), limits(1))
        );
        assert_eq!(
            (spec.networks[0].rx_limits, spec.networks[0].tx_limits),
            (limits(7), limits(2))
        );
        assert_eq!(
            (spec.vsock.as_ref().unwrap().limits, spec.rng_limits),
            (limits(3), limits(4))
        );

        spec.vsock = None;
        let rng = LimitChanges {
            rng: Some(limits(5)),
            ..LimitChanges::default()
        };
        let changes = rng.of(&spec).unwrap();
        assert_eq!(changes[0].device, 3, "there is no socket device before it");
        changes[0].apply(&mut spec);
        assert_eq!(spec.rng_limits, limits(5));
    }

    #[test]
    fn what_cannot_be_limited_so_is_named() {
        let field = |changes: LimitChanges, spec: &GuestSpec| match changes.of(spec) {
            Err(HostError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        let disks = |id: &str, n| LimitChanges {
            disks: vec![(id.into(), limits(n))],
            ..LimitChanges::default()
        };
        assert_eq!(field(disks("c", 1), &spec()), "disks.c");
        assert_eq!(field(disks("a", 0), &spec()), "disks.a.operations.per_second");
        assert_eq!(
            field(disks("a", u64::MAX), &spec()),
            "disks.a.operations.per_second"
        );
        let net = |tap: &str, rx| LimitChanges {
            networks: vec![(tap.into(), NetworkLimits { rx, tx: None })],
            ..LimitChanges::default()
        };
        assert_eq!(field(net("u", None), &spec()), "networks.u");
        assert_eq!(
            field(net("t", Some(limits(0))), &spec()),
            "networks.t.rx.operations.per_second"
        );
        let vsock = LimitChanges {
            vsock: Some(limits(1)),
            ..LimitChanges::default()
        };
        let without = GuestSpec {
            vsock: None,
            ..spec()
        };
        assert_eq!(field(vsock, &without), "vsock");
        let bad = RateLimits {
            bandwidth: Some(Rate {
                per_second: 1,
                burst: 0,
            }),
            ..RateLimits::default()
        };
        let rng = LimitChanges {
            rng: Some(bad),
            ..LimitChanges::default()
        };
        assert_eq!(field(rng, &spec()), "rng.bandwidth.burst");
    }
}
