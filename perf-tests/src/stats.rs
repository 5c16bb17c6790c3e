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

/// The slope of a line through the points: the median of the slopes of all pairs (Theil and Sen), which a few points
/// that are far off do not move. None of fewer than two different abscissae.
pub fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let mut slopes = Vec::new();
    for (i, a) in points.iter().enumerate() {
        for b in &points[i + 1..] {
            if a.0 != b.0 {
                slopes.push((b.1 - a.1) / (b.0 - a.0));
            }
        }
    }
    (!slopes.is_empty()).then(|| median(&slopes))
}

/// Resamplings behind a confidence interval.
const RESAMPLES: usize = 2000;

/// The 95 % confidence interval of the ratio of two medians.
pub fn ratio_interval(over: &[f64], under: &[f64]) -> (f64, f64) {
    interval(over, under, |a, b| a / b)
}

/// The 95 % confidence interval of the difference of two medians.
pub fn difference_interval(larger: &[f64], smaller: &[f64]) -> (f64, f64) {
    interval(larger, smaller, |a, b| a - b)
}

/// By the percentile bootstrap. The samples of one turn share the machine's state at that time, so that turns are drawn
/// as pairs. The same samples give the same interval.
fn interval(over: &[f64], under: &[f64], of: impl Fn(f64, f64) -> f64) -> (f64, f64) {
    let turns = over.len().min(under.len());
    if turns == 0 {
        return (0.0, 0.0);
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut ratios = Vec::with_capacity(RESAMPLES);
    let (mut a, mut b) = (vec![0.0; turns], vec![0.0; turns]);
    for _ in 0..RESAMPLES {
        for i in 0..turns {
            let pick = random.below(turns);
            (a[i], b[i]) = (over[pick], under[pick]);
        }
        ratios.push(of(median(&a), median(&b)));
    }
    (quantile(&ratios, 0.025), quantile(&ratios, 0.975))
}

/// xorshift64*: enough to draw samples with.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let wide = u128::from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)) * n as u128;
        (wide >> 64) as usize
    }
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

    #[test]
    fn one_point_far_off_does_not_move_the_slope() {
        let mut points: Vec<(f64, f64)> = (0..20)
            .map(|i| (f64::from(i), 100.0 - 3.0 * f64::from(i)))
            .collect();
        points[7].1 = 5000.0;
        assert_eq!(slope(&points), Some(-3.0));
        assert_eq!(slope(&[(1.0, 1.0), (1.0, 2.0)]), None);
        assert_eq!(slope(&[]), None);
    }

    #[test]
    fn the_interval_holds_the_ratio_and_narrows_with_more_samples() {
        let noisy = |n: u32, base: f64| -> Vec<f64> {
            (0..n).map(|i| base + f64::from(i * 7919 % 101) / 100.0).collect()
        };
        let width = |n| {
            let (a, b) = (noisy(n, 4.0), noisy(n, 2.0).into_iter().rev().collect::<Vec<_>>());
            let ratio = median(&a) / median(&b);
            let (low, high) = ratio_interval(&a, &b);
            assert!(low <= ratio && ratio <= high, "{low} {ratio} {high}");
            high - low
        };
        assert!(width(1000) < width(10));
        assert_eq!(ratio_interval(&[6.0; 5], &[2.0; 5]), (3.0, 3.0));
        assert_eq!(ratio_interval(&[], &[1.0]), (0.0, 0.0));
        assert_eq!(difference_interval(&[6.0; 5], &[2.0; 5]), (4.0, 4.0));
    }
}
