//! Figures, their medians, and how they compare with what the project demands.

use serde::Serialize;

/// What is demanded of a figure: at most this much.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Demand {
    /// Without this it is not done.
    pub must: f64,
    /// What it should become.
    pub aim: f64,
}

/// One thing that was measured several times.
#[derive(Debug, Serialize)]
pub struct Figure {
    name: &'static str,
    unit: &'static str,
    median: f64,
    min: f64,
    /// Of twenty runs, the second worst: so of fewer, the worst.
    p95: f64,
    max: f64,
    runs: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    demand: Option<Demand>,
}

impl Figure {
    /// The figure of `values`; `None` when there are none.
    pub fn new(
        name: &'static str,
        unit: &'static str,
        mut values: Vec<f64>,
        demand: Option<Demand>,
    ) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let median = match values.len() % 2 {
            0 => (values.get(middle.wrapping_sub(1))? + upper) / 2.0,
            _ => upper,
        };
        // The nearest rank: the smallest value that is at least as large as 95 of a hundred.
        let p95 = *values.get((values.len() * 95).div_ceil(100).wrapping_sub(1))?;
        Some(Figure { name, unit, median, min, p95, max, runs: values.len(), demand })
    }

    fn verdict(&self) -> &'static str {
        match self.demand {
            None => "",
            Some(demand) if self.median <= demand.aim => "aim",
            Some(demand) if self.median <= demand.must => "must",
            Some(_) => "missed",
        }
    }
}

/// All figures of one benchmark.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was measured, and how.
    pub title: String,
    /// The kind of host: figures of different kinds must not be compared.
    pub host: String,
    /// What came out.
    pub figures: Vec<Figure>,
}

impl Report {
    /// The report for a person.
    pub fn table(&self) -> String {
        let mut text = format!("{}\nhost: {}\n\n", self.title, self.host);
        text += &format!(
            "{:<58}{:>10}{:>10}{:>10}{:>10}{:>8}{:>8}  {}\n",
            "", "median", "min", "p95", "max", "must", "aim", "reached"
        );
        for figure in &self.figures {
            let name = format!("{} [{}]", figure.name, figure.unit);
            let (must, aim) = figure.demand.map_or((String::new(), String::new()), |d| {
                (format!("≤ {}", d.must), format!("≤ {}", d.aim))
            });
            text += &format!(
                "{name:<58}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{must:>8}{aim:>8}  {}\n",
                figure.median,
                figure.min,
                figure.p95,
                figure.max,
                figure.verdict()
            );
        }
        text
    }

    /// The report for a program.
    ///
    /// # Errors
    /// Never, as long as figures are finite.
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let median = |values: &[f64]| Figure::new("x", "ms", values.to_vec(), None).map(|f| f.median);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn ninety_five_of_a_hundred() {
        let p95 =
            |count: u32| Figure::new("x", "ms", (1..=count).map(f64::from).collect(), None).map(|f| f.p95);
        assert_eq!([p95(1), p95(5), p95(20), p95(100)], [Some(1.0), Some(5.0), Some(19.0), Some(95.0)]);
    }

    #[test]
    fn verdicts() {
        let verdict = |value| {
            Figure::new("x", "ms", vec![value], Some(Demand { must: 10.0, aim: 3.0 })).unwrap().verdict()
        };
        assert_eq!((verdict(3.0), verdict(4.0), verdict(10.5)), ("aim", "must", "missed"));
    }
}
