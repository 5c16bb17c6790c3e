//! Order statistics of a list of samples.

/// The median (the upper one of an even number), or zero of none.
pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// The sample below which the share `q` (0 to 1) of all lies.
pub fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * q) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_come_from_the_sorted_list() {
        let samples = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(
            (quantile(&samples, 0.0), median(&samples), quantile(&samples, 1.0)),
            (1.0, 3.0, 5.0)
        );
        assert_eq!(median(&[]), 0.0);
    }
}
