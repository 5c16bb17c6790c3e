//! How errors are told.

use shoal_api_types::Problem;

/// An error as it is printed: for a problem that the daemon told, its title, detail, field and hint; else the chain of
/// causes.
pub fn describe(error: &anyhow::Error) -> String {
    let Some(problem) = error.downcast_ref::<Problem>() else {
        let chain: Vec<_> = error.chain().map(ToString::to_string).collect();
        return format!("shoal: {}\n", chain.join(": "));
    };
    let mut text = format!("shoal: {}: {}\n", problem.title, problem.detail);
    if let Some(field) = &problem.field {
        text.push_str(&format!("  field: {field}\n"));
    }
    if let Some(hint) = &problem.hint {
        text.push_str(&format!("  hint: {hint}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_all_of_a_problem() {
        let problem = Problem {
            kind: "k".into(),
            title: "T".into(),
            status: 422,
            detail: "d".into(),
            field: Some("f".into()),
            hint: Some("h".into()),
            instance: None,
        };
        assert_eq!(describe(&problem.into()), "shoal: T: d\n  field: f\n  hint: h\n");
        let error = anyhow::anyhow!("inner").context("outer");
        assert_eq!(describe(&error), "shoal: outer: inner\n");
    }
}
